# The commands of the README. Everything they need is fetched by scripts/setup.

CACHE := $(or $(ONPOLICY_CACHE),$(HOME)/.cache/onpolicy)
MODEL ?= $(CACHE)/models/SmolLM2-135M-Instruct/SmolLM2-135M-Instruct.Q4_1.gguf

RESULTS ?= benches/results
BENCH = cargo run --release --quiet -- bench

.PHONY: quickstart test test-mistralrs setup build bench fmt lint doc

quickstart: setup          ## train the real model on one-digit sums, served the whole time
	cargo run --release -- train --config examples/quickstart.toml --model $(MODEL) $(ARGS)

test: setup                ## everything that CI checks
	scripts/test

test-mistralrs: setup      ## the engine over mistral.rs; compiles for half an hour the first time
	scripts/test-mistralrs

setup:                     ## libtorch and the model, into the cache
	@scripts/setup

build: setup               ## the command, in the cache's target directory
	cargo build --release

bench: setup               ## a short set of benchmarks; results and a picture into $(RESULTS)
	cargo build --release
	$(BENCH) rollout --model $(MODEL) --workload W1,W2 --no-sharing --json $(RESULTS)/rollout.json
	$(BENCH) train --model $(MODEL) --json $(RESULTS)/train.json
	$(BENCH) step --model $(MODEL) --json $(RESULTS)/step.json
	$(BENCH) update --model $(MODEL) --json $(RESULTS)/update.json
	$(BENCH) plot $(RESULTS)/rollout.json $(RESULTS)/train.json $(RESULTS)/step.json \
		$(RESULTS)/update.json --out $(RESULTS)/bench.png

fmt:                       ## format the code
	cargo fmt --all

lint: setup                ## formatting and clippy, as CI has it
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets -- -D warnings

doc: setup                 ## the API's documentation
	cargo doc --release --workspace --no-deps
