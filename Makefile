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

# --- the demo, from film to mAP table: plain commands that can be copied -------------------------------------------------

RUNS := $(SEEDS:%=$(DEMO)/tca-%)
FEATURES := $(DEMO)/train.hdf5 $(DEMO)/val.hdf5 $(DEMO)/test.hdf5

demo: $(RUNS:%=%/model.pth) $(FEATURES)
	$(RUN) evaluation.py --dataset DEMO --annotation_dir $(DEMO)/annotations --feature_path $(DEMO)/test.hdf5 \
	  --model_path $(RUNS) --metric cosine sym_chamfer chamfer --baseline cosine chamfer --output $(DEMO)/results.json
	@echo "videos, annotations, features, models and results.json are in $(DEMO)"

# The film cut into videos, with graded copies of them and annotations.
$(DEMO)/built: datasets/demo/film.mp4 datasets/demo/shots.csv $(wildcard datasets/demo/*.py) | .venv/ready
	$(RUN) datasets/demo/make_demo.py build --output $(DEMO)
	touch $@

# Frame features: four maps of EfficientNet-Lite0, iMAC, one frame a second.
$(DEMO)/raw-%.hdf5: $(DEMO)/built
	$(RUN) pre-processing/extract_features.py $(DEMO)/videos/$* --output $@ --backbone efficientnet_lite0 --pooling imac

# PCA fitted on all frames of the training part; without --no_whiten it whitens (README.md has that table too).
$(DEMO)/pca.npz: $(DEMO)/raw-train.hdf5
	$(RUN) pre-processing/pca.py fit $< --components 512 --no_whiten --frames_per_video 100 --output $@

$(DEMO)/%.hdf5: $(DEMO)/raw-%.hdf5 $(DEMO)/pca.npz
	$(RUN) pre-processing/pca.py apply $< --pca $(DEMO)/pca.npz --output $@

# Three seeds. The paper's loss and momentum; for three minutes of film: start near the identity, a small bank of fresh keys,
# entries that show the anchor's own film left out, a higher rate, and the epoch that held-out film likes best.
$(DEMO)/tca-%/model.pth: $(FEATURES)
	$(RUN) train.py --annotation_path $(DEMO)/annotations/demo_train.pickle --feature_path $(DEMO)/train.hdf5 \
	  --model_path $(@D) --seed $* --init near_identity --moco_k 256 --neg_num 4 --mask_shared \
	  --batch_sz 32 --epochs 4 --learning_rate 2e-4 \
	  --val_set DEMO-VAL --val_feature_path $(DEMO)/val.hdf5 --annotation_dir $(DEMO)/annotations

.SECONDARY:
