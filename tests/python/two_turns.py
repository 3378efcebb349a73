"""A harness for verifiers: it asks the task's question, then asks once more."""

from openai import AsyncOpenAI
from verifiers.v1 import Harness, HarnessConfig, ProgramResult


class TwoTurnsConfig(HarnessConfig):
    """Nothing to set."""


class TwoTurns(Harness[TwoTurnsConfig]):
    """Runs in this process; every model call goes through verifiers' endpoint."""

    NEEDS_CONTAINER = False
    EXECUTES_CODE = False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data):
        _, question = self.resolve_prompt(data)
        messages = [{"role": "user", "content": question}]
        async with AsyncOpenAI(base_url=endpoint, api_key=secret, max_retries=0) as client:
            for turn in range(2):
                answer = await client.chat.completions.create(model=ctx.model, messages=messages)
                message = answer.choices[0].message
                messages.append({"role": "assistant", "content": message.content or ""})
                messages.append({"role": "user", "content": "Are you sure?"})
        return ProgramResult(exit_code=0, stdout="", stderr="")


__all__ = ["TwoTurns"]
