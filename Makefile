# An index of what can be done here, one line each; the work is in scripts/ and xtask/.
.DEFAULT_GOAL := help
.PHONY: help peers proto setup build install demo demo-color downstream test check fmt clippy tidy deny ci bench bench-data bench-allreduce bench-parity bench-ckpt bench-stall sim chaos bench-recovery bench-goodput bench-overhead bench-scale strace gpu-check gpu-bench clean clean-all
# Histories that `make sim` plays.
SEEDS ?= 100000

# Where `make install` puts things.
PREFIX ?= /opt/lacuna

# Every crate, but without libtorch not the one that links it.
CRATES := --workspace $(if $(LIBTORCH)$(wildcard third_party/libtorch/build-version),,--exclude lacuna-mae)

help: ## print this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 24
# What `make setup` found: cargo's arguments, and tools that building needs.
FEATURES := $(shell cat third_party/features 2>/dev/null)
export PATH := $(CURDIR)/third_party/tools/bin:$(PATH)

setup: ## check the tools, fetch libtorch, build (CUDA=1 fetches the CUDA libraries too)
	@python3 scripts/setup.py
build: ## build `lacuna` and `lacuna-worker` into target/release
	@cargo build --release --package lacuna-cli --package lacuna-mae $(FEATURES)
install: build ## put programs and libtorch into PREFIX, a folder to copy (/opt/lacuna)
	@scripts/install.sh "$(PREFIX)"
demo: build ## pack images, train with two workers, kill one, look at the result (DATA_DIR=folder)
	@python3 scripts/demo.py
demo-color: build ## pre-train on colour textures, look at them, probe for materials (fetches 336 MB)
	@python3 scripts/demo_color.py
downstream: build ## does pre-training help? k-NN, probes, fine-tuning (half an hour; BENCH=--full: five hours)
	@python3 scripts/downstream.py $(BENCH)
peers: ## fetch what the tests of grpcurl, buf, a Python client and TensorBoard need
	@python3 scripts/peers.py
test: ## run every test that needs no GPU
	@scripts/test.sh
sim: ## play SEEDS histories of faults (100000), with every invariant checked after every event
	@cargo run --quiet --release --package lacuna-sim -- run --seeds 0..$(SEEDS) --coverage
check: fmt clippy tidy deny ## check format, lints, layers and licences
fmt: ## check the format
	@cargo fmt --all --check
clippy: ## check the lints
	@cargo clippy $(CRATES) $(FEATURES) --all-targets -- -D warnings
	@$(if $(findstring exclude,$(CRATES)),echo "clippy: lacuna-mae skipped: no libtorch (make setup)")
tidy: ## check layers, purity, file sizes, links
	@cargo xtask tidy
deny: ## check licences and sources of dependencies, where cargo-deny is installed
	@if command -v cargo-deny >/dev/null; then cargo deny check; else echo "deny: skipped: cargo-deny is not installed (cargo install cargo-deny)"; fi
# A build that is thrown away gains nothing by the incremental cache, which is half its size.
ci: export CARGO_INCREMENTAL = 0
ci: ## what continuous integration runs: prepare, check, test
	@python3 scripts/setup.py --no-build
	@python3 scripts/peers.py || true
	@$(MAKE) --no-print-directory check
	@$(MAKE) --no-print-directory test
proto: ## generate the gRPC code from proto/ anew
	@cargo run --quiet --package xtask --features codegen -- proto
strace: ## break every system call on checkpoint files, in small processes and in whole runs (20 min)
	@LACUNA_STRACE=all cargo test $(CRATES) $(FEATURES) --test it syscalls -- --nocapture
bench: ## time a training step here and in PyTorch (BENCH="--python v/bin/python", "--help")
	@python3 scripts/bench/step.py --compile --ddp --same-malloc $(BENCH)
bench-data: ## images a second, here and in Python's loaders (BENCH="--python v/bin/python")
	@python3 scripts/bench/images.py $(BENCH)
bench-allreduce: ## all-reduce between two processes, here and over gloo (BENCH="--python v/bin/python")
	@python3 scripts/bench/allreduce.py $(BENCH)
bench-parity: ## train 2,000 steps here and in PyTorch on equal inputs (BENCH="--python v/bin/python")
	@python3 scripts/bench/parity.py $(BENCH)
bench-ckpt: ## save and load checkpoints, here and in torch (BENCH="--python v/bin/python")
	@python3 scripts/bench/checkpoint.py $(BENCH)
bench-stall: build ## what saving costs steps and memory (BENCH="--preset small")
	@python3 scripts/bench/stall.py $(BENCH)
chaos: ## runs under seeded faults against an undisturbed one (MINUTES=60 SEED=1 CHAOS="--help")
	@cargo build --release --quiet --package lacuna-tests --bins
	@target/release/lacuna-chaos run --minutes $(or $(MINUTES),0) --seed $(or $(SEED),1) $(CHAOS)
bench-recovery: ## time recoveries from single faults (BENCH="--help" for more)
	@cargo build --release --quiet --package lacuna-tests --bins
	@target/release/lacuna-chaos recovery $(BENCH)
bench-goodput: ## progress under Poisson kills, against restarts from checkpoints (BENCH="--help")
	@cargo build --release --quiet --package lacuna-tests --bins
	@target/release/lacuna-chaos goodput $(BENCH)
bench-overhead: ## what beats, marks, ledger and digests cost (BENCH="--help" for more)
	@cargo build --release --quiet --package lacuna-tests --bins
	@target/release/lacuna-chaos overhead $(BENCH)
bench-scale: ## load one coordinator with 1,024 stub workers, and with 100 runs (BENCH="--help")
	@cargo build --release --package lacuna-tests
	@target/release/lacuna-scale $(BENCH)
gpu-check: ## build the check for a machine with a GPU; run it if one is here
	@scripts/gpu_check.sh
gpu-bench: ## build the comparison with PyTorch on a GPU; run it if one is here
	@scripts/gpu_check.sh bench
clean: ## remove what was built
	@cargo clean
clean-all: clean ## remove libtorch and the demo's output too (downloads stay in the cache)
	@rm -rf third_party demo-out demo-color-out downstream-out .lacuna
