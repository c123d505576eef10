# Every target sets up its environment by itself, once: tools/setup_env.sh.
# ISVIT_ENV, STACK, WHEELHOUSE, PYTHON and MAX_JOBS reach it from make's command
# line.
SHELL := bash
.SHELLFLAGS := -e -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo picture methods accuracy bench-calibration bench-scaling \
	bench-memory bench-runtime bench-engines learn-coco60 bench-coco60 test \
	test-openmmlab test-slow test-sanitizers test-vnni test-arm test-browser \
	fuzz wheel platform-wheel torture check train format clean

# The demo's detector: MODEL=mask with BACKBONE=swin or deit, or MODEL=cascade.
MODEL := mask
BACKBONE := swin
DRAWN_mask_swin := mask-rcnn_swin-mini_fpn
DRAWN_mask_deit := mask-rcnn_deit-mini_sfpn
DRAWN_cascade_swin := cascade-mask-rcnn_swin-mini_fpn
DRAWN = configs/drawn/$(or $(DRAWN_$(MODEL)_$(BACKBONE)),$(error \
	MODEL=$(MODEL) BACKBONE=$(BACKBONE) is not there: give mask with swin or \
	deit, or cascade with swin))
DEMO_mask = tools/quantize_det.py $(DRAWN)_isvit-w4a4_drawn.py \
	--engine both --work-dir work_dirs/demo_$(BACKBONE)
DEMO_cascade = -m benchmarks.methods $(DRAWN)_isvit-w4a4_drawn.py \
	--methods isvit --seeds 0 --bits w4a4 w3a3 --scopes backbone detector \
	--work-dir work_dirs/demo_cascade
SWIN_T := mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py
VIT_B := configs/vit/mask-rcnn_vit-b-p16_sfpn_lsj-100e_coco.py
COCO60 := configs/coco_subset/mask-rcnn_deit-t-p16_sfpn
ON_COCO = --iters 10 --cfg-options \
	train_dataloader.dataset.data_root=$(COCO_ROOT)/
# ViTDet's training set is repeated by a wrapper.
ON_REPEATED_COCO = $(subst dataset.data_root,dataset.dataset.data_root,$(ON_COCO))
CODE := $(wildcard isvit_det tools tests benchmarks)

# The package is not installed: commands use this folder's.
IN_ENV = env=$$(tools/setup_env.sh); \
	export PATH="$$env/bin:$$PATH" PYTHONPATH='$(CURDIR)';

# What other engines need, the extra "export", lies beside the environment's
# packages, so that these stay as they are. Without a network it is left out.
WITH_EXTRA = extra=$$env/export; \
	if ! cmp -s requirements/export.txt "$$extra/complete"; then \
		python -m pip install --quiet --disable-pip-version-check --no-deps \
			--retries 1 --upgrade --target "$$extra" \
			-r requirements/export.txt && \
			cp requirements/export.txt "$$extra/complete" || \
			echo 'the packages of requirements/export.txt did not install'; \
	fi; \
	export PYTHONPATH="$$PYTHONPATH:$$extra";

# Compiles the library before libraries are preloaded or tests are timed.
COMPILE = python -c 'from isvit_det.runtime.build import *; library_path()'
# The tests that call the kernels.
NATIVE_TESTS = tests/runtime --ignore=tests/runtime/test_build.py \
	--ignore=tests/runtime/test_replay.py \
	--ignore=tests/runtime/test_other_builds.py
# Without inlining: what is checked of whole inlined loops compiles for minutes.
SANITIZED = export ISVIT_DET_CXXFLAGS='-O1 -g1 -DISVIT_INLINE= \
	-fsanitize=address,undefined -fno-sanitize-recover=undefined'; $(COMPILE); \
	export ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$( \
	$${CXX:-c++} -print-file-name=libasan.so) $$( \
	$${CXX:-c++} -print-file-name=libstdc++.so.6)";
# Without its own instructions: the compiler must not use them.
EMULATED = export ISVIT_DET_CXXFLAGS='-Wno-psabi -mno-avx512f -mno-avxvnni \
	-include $(CURDIR)/tests/runtime/emulated_vnni.h'; $(COMPILE);

# Processes that share the tests, each with one thread. What remains of one's
# tests goes to another that has none left.
WORKERS = $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || \
	getconf _NPROCESSORS_ONLN)

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-18s %s\n", $$1, $$2}' \
		$(MAKEFILE_LIST)
	@echo 'WHEELHOUSE=DIR adds a folder of wheels to the set-up.'

demo:  ## a small detector in 4 bits; BACKBONE=deit, or MODEL=cascade
	@$(IN_ENV) TIMEFORMAT='make demo took %0R s'; \
	time python $(or $(DEMO_$(MODEL)),$(DRAWN))

picture:  ## draw docs/images/bits.jpg: the demo's detector in fewer bits
	@$(IN_ENV) python -m benchmarks.picture

methods:  ## the four methods at 3 bits on two seeds, of the demo's detector
	@$(IN_ENV) python -m benchmarks.methods $(DRAWN)_isvit-w3a3_drawn.py

bench-calibration:  ## streaming against restarting; COCO_ROOT=DIR for COCO
	@$(IN_ENV) python -m benchmarks.calibration $(if $(COCO_ROOT),$(SWIN_T) \
		random --images 2 --held-out 1 $(ON_COCO))

bench-scaling:  ## how calibration grows; COCO_ROOT=DIR for COCO images
	@$(IN_ENV) python -m benchmarks.scaling $(if $(COCO_ROOT),$(SWIN_T) \
		$(ON_COCO))

bench-memory:  ## peak memory of a ViT-B at 800x1333; needs COCO_ROOT=DIR
	@$(IN_ENV) python -m benchmarks.calibration $(VIT_B) random \
		--scheme items --method isvit --images 4 --held-out 1 --store-gb 1 \
		$(ON_REPEATED_COCO) \
		test_dataloader.dataset.pipeline.1.scale='(1333,800)' \
		model.data_preprocessor.pad_size_divisor=32

bench-runtime:  ## against OpenVINO and others; SUBJECTS=all THREADS='1 2'
	@$(IN_ENV) $(WITH_EXTRA) \
	python -m benchmarks.runtime \
		$(if $(SUBJECTS),--subjects $(SUBJECTS)) \
		$(if $(THREADS),--threads $(THREADS)) \
		$(if $(BITS),--bits $(BITS)) $(ARGS) && python -m benchmarks.pages

bench-engines:  ## AP of the drawn detectors in the simulation and natively
	@$(IN_ENV) OMP_NUM_THREADS=1 python -m benchmarks.engines

accuracy:  ## methods and ablations; COCO_ROOT, DEIT_TINY, BUDGET=MINUTES
	@$(IN_ENV) python -m benchmarks.accuracy \
		$(if $(BUDGET),--budget $(BUDGET))

learn-coco60:  ## fine-tune DeiT-tiny on 60 images, COCO_ROOT, DEIT_TINY
	@$(IN_ENV) python "$$(python -c 'import mmdet; print(mmdet.__path__[0])' \
		)/.mim/tools/train.py" $(COCO60)_320px_coco60.py \
		--work-dir work_dirs/coco60 --resume; \
	python tools/publish_float.py work_dirs/coco60 work_dirs/coco60/float.pth

bench-coco60:  ## bits and scopes on the detector of learn-coco60
	@$(IN_ENV) python -m benchmarks.methods $(COCO60)_isvit-w4a4_320px_coco60.py \
		work_dirs/coco60/float.pth --methods isvit --seeds 0 \
		--bits w3a3 w4a4 w6a6 --scopes backbone detector \
		--learned $(COCO60)_isvit-w4a4_320px_coco60_learned.py

test:  ## run the tests that take seconds, on all cores; ARGS='-k WORD'
	@$(IN_ENV) $(WITH_EXTRA) \
	OMP_NUM_THREADS=1 pytest -q -n $(WORKERS) --dist worksteal $(ARGS)

test-openmmlab:  ## the same tests on OpenMMLab's own last releases
	@$(MAKE) --no-print-directory test STACK=openmmlab

test-slow:  ## run the tests that take minutes
	@$(IN_ENV) pytest -q -m slow

test-sanitizers:  ## the kernels' tests, watched for bad addresses and arithmetic
	@$(IN_ENV) \
	[ -e "$$($${CXX:-c++} -print-file-name=libasan.so)" ] || { echo 'skipped: \
	there is no libasan.so; the package libgcc-12-dev, or that of your gcc, \
	has it'; exit 0; }; \
	$(SANITIZED) OMP_NUM_THREADS=1 pytest -q $(NATIVE_TESTS) $(ARGS)

test-vnni:  ## the kernels' tests, VNNI emulated where the CPU lacks it
	@$(IN_ENV) \
	echo '#include <simde/x86/avx512/dpbusd.h>' | \
	$${CXX:-c++} -E -x c++ - >/dev/null 2>&1 || { echo 'skipped: there is no \
	SIMDe; the package libsimde-dev has it'; exit 0; }; \
	$(EMULATED) OMP_NUM_THREADS=1 pytest -q $(NATIVE_TESTS) $(ARGS)

test-arm:  ## the portable kernels on an emulated ARM, to the bit
	@$(IN_ENV) pytest -q -rs -m slow tests/runtime/test_replay.py $(ARGS)

test-browser:  ## reports in a headless Chromium: toggles, sorting, no request
	@$(IN_ENV) \
	command -v chromium chromium-browser google-chrome >/dev/null || { \
	echo 'skipped: there is no Chromium; the package chromium of Debian has it'; \
	exit 0; }; \
	OMP_NUM_THREADS=1 pytest -q -rs -m slow tests/page/test_browser.py $(ARGS)

fuzz:  ## kernels on layers of random shapes; SECONDS=N, SANITIZERS=1, VNNI=1
	@$(IN_ENV) $(if $(SANITIZERS),$(SANITIZED)) $(if $(VNNI),$(EMULATED)) \
	OMP_NUM_THREADS=1 python -m benchmarks.fuzz \
	$(if $(SECONDS),--seconds $(SECONDS)) $(ARGS)

wheel:  ## a wheel in dist/: the package, its configs, the demo's weights
	@$(IN_ENV) python -m pip wheel --quiet --no-deps --no-build-isolation \
		--wheel-dir dist .; rm -rf build isvit_det.egg-info; ls dist/*.whl

platform-wheel: wheel  ## the same with the kernels compiled, by auditwheel
	@$(IN_ENV) rm -f dist/isvit_det-*-py3-none-*linux*.whl; \
	tools/platform_wheel.sh dist/isvit_det-*-py3-none-any.whl dist; \
	ls dist/*linux*.whl

torture:  ## kills, full disks, damaged files, memory; MINUTES=N at most
	@$(IN_ENV) OMP_NUM_THREADS=1 python -m benchmarks.torture \
		$(if $(MINUTES),--minutes $(MINUTES))

check:  ## check imports, format, style and types
	@$(IN_ENV) status=0; \
	isort --check-only --diff $(CODE) || status=1; \
	yapf --parallel --recursive --diff $(CODE) || status=1; \
	flake8 $(CODE) || status=1; \
	mypy $(filter-out tests,$(CODE)) || status=1; \
	exit $$status

train:  ## train the demo's float detector; BACKBONE=deit, or MODEL=cascade
	@$(IN_ENV) python "$$(python -c 'import mmdet; print(mmdet.__path__[0])' \
		)/.mim/tools/train.py" $(DRAWN)_drawn_train.py \
		--work-dir work_dirs/train_$(MODEL)_$(BACKBONE) --resume; \
	python tools/publish_float.py work_dirs/train_$(MODEL)_$(BACKBONE) \
		$(DRAWN)_drawn.pth

format:  ## rewrite imports and format
	@$(IN_ENV) isort $(CODE); yapf --parallel --recursive --in-place $(CODE)

clean:  ## remove caches and build leftovers; work_dirs/ stays
	@rm -rf build *.egg-info .mypy_cache .pytest_cache
	@find $(CODE) -name __pycache__ -prune -exec rm -rf {} +
