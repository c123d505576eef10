# Every target sets up its environment by itself, once: tools/setup_env.sh.
# ISVIT_ENV, WHEELHOUSE, PYTHON and MAX_JOBS reach it from make's command line.
SHELL := bash
.SHELLFLAGS := -e -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo methods bench-calibration bench-scaling test test-slow \
	check train format clean

# The demo's backbone: swin or deit.
BACKBONE := swin
DRAWN_swin := mask-rcnn_swin-mini_fpn
DRAWN_deit := mask-rcnn_deit-mini_sfpn
DRAWN = configs/drawn/$(or $(DRAWN_$(BACKBONE)),$(error \
	BACKBONE=$(BACKBONE) is not allowed: give swin or deit))
SWIN_T := mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py
ON_COCO = --iters 10 --cfg-options \
	train_dataloader.dataset.data_root=$(COCO_ROOT)/
CODE := $(wildcard isvit_det tools tests benchmarks)

# The package is not installed: commands use this folder's.
IN_ENV = env=$$(tools/setup_env.sh); \
	export PATH="$$env/bin:$$PATH" PYTHONPATH='$(CURDIR)';

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-18s %s\n", $$1, $$2}' \
		$(MAKEFILE_LIST)
	@echo 'WHEELHOUSE=DIR adds a folder of wheels to the set-up.'

demo:  ## quantize a small detector to 4 bits; BACKBONE=deit for a DeiT
	@$(IN_ENV) TIMEFORMAT='make demo took %0R s'; \
	time python tools/quantize_det.py $(DRAWN)_isvit-w4a4_drawn.py \
		--work-dir work_dirs/demo_$(BACKBONE)

methods:  ## compare the four methods at 3 bits on two seeds
	@$(IN_ENV) python benchmarks/methods.py

bench-calibration:  ## streaming against restarting; COCO_ROOT=DIR for COCO
	@$(IN_ENV) python -m benchmarks.calibration $(if $(COCO_ROOT),$(SWIN_T) \
		random --images 2 --held-out 1 $(ON_COCO))

bench-scaling:  ## how calibration grows; COCO_ROOT=DIR for COCO images
	@$(IN_ENV) python -m benchmarks.scaling $(if $(COCO_ROOT),$(SWIN_T) \
		$(ON_COCO))

test:  ## run the tests that take seconds
	@$(IN_ENV) pytest -q

test-slow:  ## run the tests that take minutes
	@$(IN_ENV) pytest -q -m slow

check:  ## check imports, format, style and types
	@$(IN_ENV) status=0; \
	isort --check-only --diff $(CODE) || status=1; \
	yapf --parallel --recursive --diff $(CODE) || status=1; \
	flake8 $(CODE) || status=1; \
	mypy $(filter-out tests,$(CODE)) || status=1; \
	exit $$status

train:  ## train the demo's float detector; BACKBONE=deit for the DeiT's
	@$(IN_ENV) python "$$(python -c 'import mmdet; print(mmdet.__path__[0])' \
		)/.mim/tools/train.py" $(DRAWN)_drawn_train.py \
		--work-dir work_dirs/train_$(BACKBONE) --resume; \
	python tools/publish_float.py work_dirs/train_$(BACKBONE) \
		$(DRAWN)_drawn.pth

format:  ## rewrite imports and format
	@$(IN_ENV) isort $(CODE); yapf --parallel --recursive --in-place $(CODE)

clean:  ## remove caches and build leftovers; work_dirs/ stays
	@rm -rf build *.egg-info .mypy_cache .pytest_cache
	@find $(CODE) -name __pycache__ -prune -exec rm -rf {} +
