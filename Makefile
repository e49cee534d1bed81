# make demo · make test · make lint · make clean
# Every target makes .venv by itself and is quick when it stands.

PYTHON ?= python3
RUN := .venv/bin/python
DEMO := runs/demo
SEEDS := 0 1 2

.PHONY: help demo test lint clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# make /make /p' Makefile

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -r requirements.txt
	touch $@

test: .venv/ready lint
	$(RUN) -m pytest

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

clean:
	rm -rf runs

# --- the demo, from film to mAP table: every line is a command that you can copy -----------------------------------------

RUNS := $(SEEDS:%=$(DEMO)/tca-%)

demo: $(RUNS:%=%/model.pth) $(DEMO)/test.hdf5
	$(RUN) evaluation.py --dataset DEMO --annotation_dir $(DEMO)/annotations --feature_path $(DEMO)/test.hdf5 \
	  --model_path $(RUNS) --metric cosine sym_chamfer chamfer --baseline cosine chamfer --output $(DEMO)/results.json
	@echo "videos, annotations, features, models and results.json are in $(DEMO)"
