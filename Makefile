# Every target but gpu first installs .venv, if its requirements changed since. `search` installs
# requirements-search.txt, a part of requirements.txt; the others install the rest too. PYTHON=python3.13
# chooses the Python; an .venv of another version is made anew. Commands:
#
#   make search        what search.py needs, and nothing else; a minute, and the downloads
#   make demo          film -> videos -> features -> encoders -> table of mAP; ten minutes on two cores
#   make test          style, and all tests; with Horovod if it can be built
#   make test-fast     style, and the tests that are quick and need one process; about a minute
#   make torture       kills, two writers at once and full disks for every command; an hour, and root to mount
#   make lint          style alone
#   make tables        every table of the paper on the demo's film, in results/demo
#   make studies       the small studies of docs/results.md, in results/studies; half an hour
#   make bench         the benchmarks of benchmarks/README.md
#   make gpu           what a GPU computes against the CPU, and how fast; about ten minutes on one GPU
#   make search-model  the model that search.py ships, and its calibration
#   make fuzz          damaged files for every reader; MINUTES=60
#   make horovod       Horovod, for horovodrun; four minutes on two cores. Again: make -B horovod
#   make clean         remove runs/

PYTHON ?= python3
RUN := .venv/bin/python
DEMO := runs/demo
SEEDS := 0 1 2

.PHONY: help search demo test test-fast fuzz torture tables studies bench gpu search-model horovod lint clean
.DELETE_ON_ERROR:
.SECONDARY:

help:
	@sed -n 's/^#   make/make/p' Makefile

# .venv is made if there is none that runs, and made anew if PYTHON=... asks for another version.
version = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2> /dev/null)
PRESENT := $(call version,.venv/bin/python)
ifneq ($(origin PYTHON),file)
ASKED := $(or $(call version,$(PYTHON)),$(PYTHON))
endif
NEW_VENV := $(if $(PRESENT),$(filter-out $(PRESENT),$(ASKED)),yes)
SUPPORTED := 3.11 3.12 3.13
define make_venv
@$(if $(filter $(SUPPORTED),$(call version,$(PYTHON))),,\
  echo "error: $(PYTHON) is not one of Python $(SUPPORTED); name one by PYTHON=" >&2; exit 1)
$(PYTHON) -m venv --clear .venv
endef
.venv/search: requirements-search.txt $(if $(NEW_VENV),FORCE)
	$(if $(NEW_VENV),$(make_venv))
	.venv/bin/pip install --quiet -r requirements-search.txt
	touch $@
.venv/ready: requirements.txt .venv/search
	.venv/bin/pip install --quiet -r requirements.txt
	touch $@
.PHONY: FORCE

search: .venv/search
	@echo 'next: source .venv/bin/activate; python search.py index VIDEOS --index my.index'

# --- tests ----------------------------------------------------------------------------------------

# Two test processes; a file's tests stay in one, which builds their fixtures once.
TWO := -n 2 --dist loadfile

# If Horovod cannot be built (no compiler, no network, ...), its tests are skipped and say why.
test: .venv/ready lint
	@$(MAKE) horovod || echo "going on without Horovod"
	$(RUN) -m pytest $(TWO) -rsfE

test-fast: .venv/ready lint
	$(RUN) -m pytest $(TWO) -m "not slow and not distributed"

TRIALS := kill_100 pair_5 disk_20
torture: .venv/ready
	for trial in $(TRIALS); do \
	  PYTHONPATH=.:tests:pre-processing $(RUN) tests/torture.py $${trial%_*} $${trial#*_} || exit 1; \
	done

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# Damaged files for every reader, each in a child process with limits of memory and time.
MINUTES := 60
fuzz: .venv/ready
	mkdir -p runs
	OMP_NUM_THREADS=1 PYTHONPATH=pre-processing $(RUN) tests/fuzz.py --minutes $(MINUTES) --output runs/fuzz.json

clean:
	rm -rf runs

# Built again when its patch, its script, or the torch that it is linked with changes.
HOROVOD := .venv/horovod-$(shell sed -n 's/^torch==//p' requirements.txt).ready
horovod: $(HOROVOD)
$(HOROVOD): patches/horovod.sh patches/horovod-0.28.1.patch | .venv/ready
	rm -f .venv/horovod-*.ready
	bash patches/horovod.sh
	touch $@

# --- the demo, from film to table: plain commands that can be copied ------------------------------

RUNS := $(SEEDS:%=$(DEMO)/tca-%)
FEATURES := $(DEMO)/train.hdf5 $(DEMO)/val.hdf5 $(DEMO)/test.hdf5

demo: $(RUNS:%=%/model.pth) $(FEATURES)
	$(RUN) evaluation.py --dataset DEMO --annotation_dir $(DEMO)/annotations --feature_path $(DEMO)/test.hdf5 \
	  --model_path $(RUNS) --metric cosine sym_chamfer chamfer --baseline cosine chamfer --output $(DEMO)/results.json
	@echo "videos, annotations, features, models and results.json are in $(DEMO)"

# The film, cut into videos; copies of them, edited with increasing strength; annotations.
$(DEMO)/built: datasets/demo/film.mp4 datasets/demo/shots.csv $(wildcard datasets/demo/*.py) | .venv/ready
	$(RUN) datasets/demo/make_demo.py build --output $(DEMO)
	touch $@

# Frame features: four maps of EfficientNet-Lite0, iMAC, one frame per second.
$(DEMO)/raw-%.hdf5: $(DEMO)/built
	rm -f $@ $@.part* # an extraction would keep the features of earlier videos
	$(RUN) pre-processing/extract_features.py $(DEMO)/videos/$* --output $@ \
	  --backbone efficientnet_lite0 --pooling imac

# PCA, fitted on all frames of the training part. Without --no_whiten it whitens too.
$(DEMO)/pca.npz: $(DEMO)/raw-train.hdf5
	$(RUN) pre-processing/pca.py fit $< --components 512 --no_whiten --frames_per_video 100 --output $@

$(DEMO)/%.hdf5: $(DEMO)/raw-%.hdf5 $(DEMO)/pca.npz
	$(RUN) pre-processing/pca.py apply $< --pca $(DEMO)/pca.npz --output $@

# Three seeds, with the paper's loss and momentum. The rest suits three minutes of film: start near the
# identity, a small bank of fresh keys, no negatives that show the anchor's own film, a higher learning
# rate, the epoch that is best on validation film.
# $(call train_in,FOLDER): a run of seed $* on the features of that folder; it would resume on no others.
define train_in
rm -rf $(@D)
$(RUN) train.py --annotation_path $(DEMO)/annotations/demo_train.pickle --feature_path $(1)/train.hdf5 \
  --model_path $(@D) --seed $* --init near_identity --moco_k 256 --neg_num 4 --mask_shared \
  --batch_sz 32 --epochs 4 --val_set DEMO-VAL --val_feature_path $(1)/val.hdf5 \
  --annotation_dir $(DEMO)/annotations
endef
$(DEMO)/tca-%/model.pth: $(FEATURES)
	$(call train_in,$(DEMO)) --learning_rate 2e-4

# --- every table of the paper on the demo's film: results/demo/*.md, *.json, *.png ----------------

TABLES := runs/tables
KINDS := imac l3_imac l3_imac_full
PROJECTED := $(foreach kind,$(KINDS),$(TABLES)/$(kind)/train.hdf5 $(TABLES)/$(kind)/DEMO.hdf5)
PICTURED := --model_path results/demo/runs/l3_imac/seed0 --feature_path $(TABLES)/l3_imac/DEMO.hdf5 \
  --videos $(DEMO)/videos/test
tables: $(PROJECTED)
	OMP_NUM_THREADS=1 $(RUN) reproduce.py --table all --data $(TABLES) --set DEMO --annotation_dir $(DEMO)/annotations \
	  --output results/demo --seeds 3 --jobs 2
	$(RUN) visualize.py attention test_q05_in0 $(PICTURED) --output results/demo/attention.png
	$(RUN) visualize.py similarity test_q05 test_q05_copy3 $(PICTURED) --output docs/similarity.png

$(TABLES)/raw-l3-%.hdf5: $(DEMO)/built
	rm -f $@ $@.part*
	$(RUN) pre-processing/extract_features.py $(DEMO)/videos/$* --output $@ \
	  --backbone efficientnet_lite0 --pooling l3_imac

# As in the demo: centred and rotated, fitted on all frames of the training part. l3_imac_full keeps every
# component that varies.
$(TABLES)/imac/pca.npz: $(DEMO)/pca.npz
	mkdir -p $(@D) && cp $< $@
$(TABLES)/l3_imac/pca.npz: COMPONENTS := 512
$(TABLES)/l3_imac_full/pca.npz: COMPONENTS := 1752
$(TABLES)/l3_imac/pca.npz $(TABLES)/l3_imac_full/pca.npz: $(TABLES)/raw-l3-train.hdf5
	$(RUN) pre-processing/pca.py fit $< --components $(COMPONENTS) --no_whiten --frames_per_video 100 --output $@

$(TABLES)/imac/train.hdf5: $(DEMO)/raw-train.hdf5 $(TABLES)/imac/pca.npz
$(TABLES)/imac/DEMO.hdf5: $(DEMO)/raw-test.hdf5 $(TABLES)/imac/pca.npz
$(TABLES)/l3_imac/train.hdf5: $(TABLES)/raw-l3-train.hdf5 $(TABLES)/l3_imac/pca.npz
$(TABLES)/l3_imac/DEMO.hdf5: $(TABLES)/raw-l3-test.hdf5 $(TABLES)/l3_imac/pca.npz
$(TABLES)/l3_imac_full/train.hdf5: $(TABLES)/raw-l3-train.hdf5 $(TABLES)/l3_imac_full/pca.npz
$(TABLES)/l3_imac_full/DEMO.hdf5: $(TABLES)/raw-l3-test.hdf5 $(TABLES)/l3_imac_full/pca.npz
$(PROJECTED):
	$(RUN) pre-processing/pca.py apply $< --pca $(@D)/pca.npz --output $@

# --- the model that search.py ships, and its calibration ------------------------------------------

# Whitened features, and encoders trained on them as they need it.
WHITE := $(DEMO)/search
$(WHITE)/pca.npz: $(DEMO)/raw-train.hdf5
	mkdir -p $(@D)
	$(RUN) pre-processing/pca.py fit $< --components 512 --frames_per_video 100 --output $@
$(WHITE)/%.hdf5: $(DEMO)/raw-%.hdf5 $(WHITE)/pca.npz
	$(RUN) pre-processing/pca.py apply $< --pca $(WHITE)/pca.npz --output $@
$(WHITE)/tca-%/model.pth: $(WHITE)/train.hdf5 $(WHITE)/val.hdf5
	$(call train_in,$(WHITE)) --loss infonce --moco_t 0.015 --learning_rate 1e-4

# RECORDINGS: a folder of those that benchmarks/recordings.csv names (docs/search.md).
RECORDINGS := recordings
search-model: $(WHITE)/tca-0/model.pth
	$(RUN) -m videoindex.calibrate pack --pca $(WHITE)/pca.npz --model_path $(WHITE)/tca-0 --output models/demo
	$(RUN) -m videoindex.calibrate copies $(RECORDINGS) --list benchmarks/recordings.csv --output runs/copies
	$(RUN) -m videoindex.calibrate measure runs/copies --name lite0

# --- the small studies of docs/results.md: results/studies/*.json ---------------------------------

STUDIES := results/studies
SCORE := $(RUN) evaluation.py --annotation_dir $(DEMO)/annotations
STUDIED := $(addprefix $(STUDIES)/,whitened.json segments.json rerank.json augmented.json bfloat16.json mixed.json)
studies: $(STUDIED)
.PHONY: $(STUDIED) # they are in the repository, without the runs that made them

$(STUDIES)/whitened.json: $(SEEDS:%=$(WHITE)/tca-%/model.pth) $(WHITE)/test.hdf5
	$(SCORE) --dataset DEMO --feature_path $(WHITE)/test.hdf5 --model_path $(SEEDS:%=$(WHITE)/tca-%) \
	  --metric cosine sym_chamfer chamfer --baseline cosine sym_chamfer chamfer --output $@

$(STUDIES)/segments.json: $(RUNS:%=%/model.pth)
	$(SCORE) --dataset DEMO-VAL-SEGMENTS --feature_path $(DEMO)/val.hdf5 --model_path $(RUNS) \
	  --metric align dp tn --baseline align dp tn --output $@

$(STUDIES)/rerank.json: $(RUNS:%=%/model.pth)
	$(SCORE) --dataset DEMO --feature_path $(DEMO)/test.hdf5 --model_path $(RUNS) \
	  --rerank 23 46 92 138 184 212 230 345 --output $@

# Pairs made of the training part's originals.
$(DEMO)/originals.txt: $(DEMO)/built
	ls $(DEMO)/videos/train | sed -n 's/^\(train_w[0-9]*\)\..*/\1/p' > $@
$(DEMO)/augmented-%/model.pth: $(FEATURES) $(DEMO)/originals.txt
	rm -rf $(@D)
	$(RUN) train.py --pairs augment --annotation_path $(DEMO)/originals.txt --feature_path $(DEMO)/train.hdf5 \
	  --model_path $(@D) --seed $* --init near_identity --moco_k 256 --batch_sz 8 --epochs 10 --learning_rate 2e-4
$(STUDIES)/augmented.json: $(SEEDS:%=$(DEMO)/augmented-%/model.pth)
	$(SCORE) --dataset DEMO-VAL --feature_path $(DEMO)/val.hdf5 --model_path $(SEEDS:%=$(DEMO)/augmented-%) \
	  --metric cosine chamfer --baseline cosine chamfer --output $@

# Features of a backbone in bfloat16: by an encoder of their own, and by one of float32's.
BF16 := $(DEMO)/bfloat16
$(BF16)/raw-%.hdf5: $(DEMO)/built
	mkdir -p $(@D) && rm -f $@ $@.part*
	$(RUN) pre-processing/extract_features.py $(DEMO)/videos/$* --output $@ \
	  --backbone efficientnet_lite0 --pooling imac --amp bfloat16
$(BF16)/pca.npz: $(BF16)/raw-train.hdf5
	$(RUN) pre-processing/pca.py fit $< --components 512 --no_whiten --frames_per_video 100 --output $@
$(BF16)/%.hdf5: $(BF16)/raw-%.hdf5 $(BF16)/pca.npz
	$(RUN) pre-processing/pca.py apply $< --pca $(BF16)/pca.npz --output $@
$(BF16)/tca-%/model.pth: $(BF16)/train.hdf5 $(BF16)/val.hdf5
	$(call train_in,$(BF16)) --learning_rate 2e-4
$(STUDIES)/bfloat16.json: $(SEEDS:%=$(BF16)/tca-%/model.pth) $(BF16)/test.hdf5
	$(SCORE) --dataset DEMO --feature_path $(BF16)/test.hdf5 --model_path $(SEEDS:%=$(BF16)/tca-%) \
	  --metric cosine chamfer --baseline cosine chamfer --output $@
$(BF16)/mixed.hdf5: $(BF16)/raw-test.hdf5 $(DEMO)/pca.npz
	$(RUN) pre-processing/pca.py apply $< --pca $(DEMO)/pca.npz --output $@
$(STUDIES)/mixed.json: $(BF16)/mixed.hdf5 $(RUNS:%=%/model.pth)
	$(SCORE) --dataset DEMO --feature_path $< --model_path $(RUNS) \
	  --metric cosine chamfer --baseline cosine chamfer --output $@

# --- benchmarks: each measures a fast way against the plain way -----------------------------------

BENCHMARKS := train_step evaluate extract store pca search
bench: .venv/ready
	mkdir -p runs/bench
	for name in $(BENCHMARKS); do \
	  $(RUN) benchmarks/$$name.py --output runs/bench/$$name.json || exit 1; \
	done

# Installs nothing: it runs with the Python that is there, and skips what that lacks.
gpu:
	$(if $(PRESENT),.venv/bin/python,$(PYTHON)) benchmarks/gpu.py --output runs/gpu/gpu.json
