# The Cerebras environments. They are apart from .venv: cerebras-pytorch 2.10 pins torch 2.4.0 and numpy 1.25.0.

CSBIN := .venv-cerebras/bin
MZBIN := .venv-modelzoo/bin

.PHONY: test-cerebras test-modelzoo

# cerebras-pytorch by itself, on its CPU backend.
test-cerebras: .venv-cerebras/.ready
	OMP_NUM_THREADS=1 $(CSBIN)/python -m pytest tests/cerebras

# Beside ModelZoo 2.10, which is not on the package index: make test-modelzoo MODELZOO=~/R_2.10.0/modelzoo
test-modelzoo: .venv-modelzoo/.ready $(TESTS_READY)
	@test -n "$(MODELZOO)" || { echo "Say where ModelZoo 2.10 is: make test-modelzoo MODELZOO=PATH" >&2; exit 2; }
	$(MZBIN)/python -m pip install --quiet --no-deps --editable "$(MODELZOO)"
	OMP_NUM_THREADS=1 $(MZBIN)/python -m pytest tests/cerebras/modelzoo
	OMP_NUM_THREADS=1 SPARSE_FT_CEREBRAS_PYTHON="$(CURDIR)/$(MZBIN)/python" $(BIN)/python -m pytest tests/cerebras/test_trainer.py

.venv-cerebras/.ready: requirements/cerebras.txt requirements/cerebras_torch.py
.venv-modelzoo/.ready: requirements/cerebras-modelzoo.txt requirements/cerebras_torch.py

# --no-deps: the lists are complete, and torch's own metadata would bring gigabytes of CUDA.
.venv-cerebras/.ready .venv-modelzoo/.ready:
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python requirements/cerebras_torch.py
	$(@D)/bin/python -m pip install --quiet --no-deps --requirement $<
	$(@D)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@
