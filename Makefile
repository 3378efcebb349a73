# The commands of the README. Everything they need is fetched by scripts/setup.

CACHE := $(or $(ONPOLICY_CACHE),$(HOME)/.cache/onpolicy)
MODEL ?= $(CACHE)/models/SmolLM2-135M-Instruct/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: quickstart test setup build fmt lint doc

quickstart: setup          ## train the real model on one-digit sums, served the whole time
	cargo run --release -- train --config examples/quickstart.toml --model $(MODEL) $(ARGS)

test: setup                ## everything that CI checks
	scripts/test

setup:                     ## libtorch and the model, into the cache
	@scripts/setup

build: setup               ## the command, in the cache's target directory
	cargo build --release

fmt:                       ## format the code
	cargo fmt --all

lint: setup                ## formatting and clippy, as CI has it
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets -- -D warnings

doc: setup                 ## the API's documentation
	cargo doc --release --workspace --no-deps
