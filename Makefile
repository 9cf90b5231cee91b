# The first target that needs it makes .venv; after that nothing is installed until
# pyproject.toml or constraints.txt change. `make PYTHON=/path/to/python3` picks an interpreter.

INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help quickstart studio test lint

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' Makefile | expand -t 20

quickstart: $(INSTALLED)  ## train a tiny base and an adapter, then make a video with sound
	.venv/bin/python -m kit.run.quickstart

# Every line goes on where it was stopped.
studio: $(INSTALLED)  ## train the studio base again, in about three hours on two cores
	test -f runs/studio/shards/train/index.json || .venv/bin/python data/prepare_studio.py \
		runs/studio/shards/train --split train --clips 2400 --stills 900
	test -f runs/studio/shards/pictures/index.json || .venv/bin/python data/prepare_studio.py \
		runs/studio/shards/pictures --clips 5000 --stills 0 --seconds 0.2 --seed 1
	for part in transformer audio; do mkdir -p runs/studio/base/$$part && \
		cp data/studio_base/$$part/config.json runs/studio/base/$$part/; done
	.venv/bin/kit pretrain recipes/studio/pictures.yaml
	.venv/bin/kit pretrain recipes/studio/motion.yaml
	.venv/bin/kit pretrain recipes/studio/video.yaml
	.venv/bin/kit pretrain recipes/studio/polish.yaml
	.venv/bin/kit pretrain recipes/studio/speech.yaml
	.venv/bin/kit pretrain recipes/studio/words.yaml
	.venv/bin/kit prepare runs/studio/shards/train --out runs/studio/shards/train \
		--recipe recipes/studio/denoiser.yaml --encode
	.venv/bin/kit fit recipes/studio/denoiser.yaml
	.venv/bin/kit export runs/studio_denoiser/adapter.safetensors --to base --dtype float16 --out runs/studio

test: $(INSTALLED)  ## run the tests
	.venv/bin/python -m pytest

lint: $(INSTALLED)  ## check style and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# A Python without ensurepip cannot make environments, so it is passed over like an old one.
$(INSTALLED): pyproject.toml constraints.txt
	@for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
		if $$python -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' \
			2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
		echo "The kit needs Python 3.11 or newer with its venv module;" \
			"$(or $(PYTHON),python3) is: $$($(or $(PYTHON),python3) --version 2>&1)" >&2; \
		echo "Install one (Debian, Ubuntu: apt install python3.11 python3.11-venv)" \
			"or name one: make PYTHON=/path/to/python3" >&2; \
		exit 1; \
	fi; \
	echo "Making .venv with $$($$found --version); the packages take about 5 GB."; \
	$$found -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt -e '.[dev]'
	@touch $@
