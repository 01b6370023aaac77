# make           install
# make demo      install, then all five stages on a small gpt-oss (no GPU needed)
# make check     install, then formatting, lint and types
# make test      install, then all tests that run on a CPU
# make test-mutations  480 damaged or rewritten bases and data files, twelve through all stages
# make test-llama  compile llama.cpp once (a quarter of an hour), then tests that open exports with it
# make test-web  tests of the pages in Chromium, of the endpoint's clients and of the terminal
# make test-zero3  tests of DeepSpeed's ZeRO-3 on two CPU processes (compiles with g++)
# make test-axolotl  Axolotl compiled, and by FSDP2 on two CPU processes (two minutes)
# make test-gpu  tests that need a CUDA device, with $(PYTHON) and without .venv
# make bench     the demo, every benchmark that this machine can run, then BENCHMARKS.md
# make lock      resolve requirements/requirements.lock again, keeping versions that still fit
# make clean     remove caches and the demo's run, but not .venv
#
# 'make test PYTHON=python3.12' also tells install.sh which Python to use.

PYTHON ?= python3
STAMP := .venv/.sparselong-installed
LOCK := requirements/requirements.lock
DEMO := --config configs/tiny.yaml --run-dir runs/demo
# uv appends this to every line because pyproject.toml limits the environments. The lock's header
# says it once instead.
COMMON_MARKER := ; python_full_version < '3\.13' and platform_machine == 'x86_64' and sys_platform == 'linux'

# These take as long as all other tests together; the last one because they have imported Axolotl.
LONG := tests/distributed tests/stages/test_trained.py tests/stages/test_finetune.py \
        tests/stages/test_eval.py tests/stages/test_health_script.py tests/stages/test_example.py \
        tests/stages/test_compress.py tests/examples/test_forms.py tests/finetune/test_schedules.py
# llama.cpp through Python, in a directory of its own: the environment stays as locked.
LLAMA := .llama/0.3.36
LLAMA_TEST := tests/stages/test_llama_cpp.py
# Clients of the chat's endpoint and page, likewise. The browser itself is a package of the system.
WEB := .web/1.65.2
WEB_PACKAGES := playwright==1.65.2 pyee greenlet openai==3.57.0 distro jiter sniffio httpx2 httpcore2 \
                truststore
# DeepSpeed, likewise; it compiles its exchange between CPU processes at the first run.
ZERO3 := .deepspeed/0.19.8
ZERO3_PACKAGES := deepspeed==$(notdir $(ZERO3)) hjson msgpack ninja py-cpuinfo
ZERO3_TEST := tests/examples/test_zero3.py
AXOLOTL_TEST := tests/examples/test_axolotl_long.py
# A test that hangs fails after five minutes instead of blocking the whole run. test_trained.py and
# test_finetune.py, whose fixtures train first, set fifteen minutes themselves.
PYTEST := OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q --timeout 300

# Each measures one subject, and says if it needs a GPU. The other files in benchmarks/ are helpers,
# or compare two checkouts.
BENCHMARKS := demo attention attention_tiles expert_gemm neighbours liger generation chat memory solver \
              train_step compiled context_parallel fit_120b true_widths compress_rate export quality \
              sharded_full

.PHONY: demo check test test-long test-short test-mutations test-llama test-web test-zero3 test-axolotl test-gpu bench lock clean

$(STAMP): install.sh pyproject.toml $(LOCK) requirements/overrides.txt
	./install.sh

demo: $(STAMP)
	.venv/bin/python 01_health.py $(DEMO)
	.venv/bin/python 02_compress.py $(DEMO)
	.venv/bin/python 03_finetune.py $(DEMO)
	.venv/bin/python 04_eval.py $(DEMO)
	.venv/bin/python 05_export.py $(DEMO) --to mxfp4 gguf
	.venv/bin/python 06_chat.py $(DEMO) --prompt "What is lzma?"
	@echo 'talk to it: .venv/bin/python 06_chat.py $(DEMO)    (--web: on a page)'
	@printf 'see what was done and measured: '; .venv/bin/python -m sparselong.report runs/demo

# basedpyright is a pyright that downloads nothing when it runs; it reads [tool.pyright].
check: $(STAMP)
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/basedpyright --level error

# Two pytest processes with one thread each: on two cores that takes little more than half the time.
test: $(STAMP)
	@echo "running two pytest processes in parallel; each prints its output when it is done"
	$(MAKE) --no-print-directory --jobs 2 --output-sync=target test-long test-short

test-long: $(STAMP)
	$(PYTEST) $(LONG)

test-short: $(STAMP)
	$(PYTEST) --ignore tests/gpu --ignore tests/web --ignore $(LLAMA_TEST) --ignore $(ZERO3_TEST) \
	    --ignore $(AXOLOTL_TEST) $(LONG:%=--ignore %) tests

test-mutations: $(STAMP)
	$(PYTEST) --all-mutations tests/inputs/test_mutations.py

$(LLAMA): | $(STAMP)
	rm -rf $@ $@.part
	.uv/bin/uv pip install -q --python .venv/bin/python --target $@.part --no-deps \
	    --no-binary llama-cpp-python llama-cpp-python==$(notdir $@) diskcache==5.6.3
	mv $@.part $@
	touch $@

test-llama: $(STAMP) $(LLAMA)
	PYTHONPATH=$(LLAMA) $(PYTEST) -rs $(LLAMA_TEST)

$(WEB): | $(STAMP)
	rm -rf $@ $@.part
	.uv/bin/uv pip install -q --python .venv/bin/python --target $@.part --no-deps $(WEB_PACKAGES)
	mv $@.part $@

test-web: $(STAMP) $(WEB)
	PYTHONPATH=$(WEB) $(PYTEST) tests/web

$(ZERO3): | $(STAMP)
	rm -rf $@ $@.part
	.uv/bin/uv pip install -q --python .venv/bin/python --target $@.part --no-deps $(ZERO3_PACKAGES)
	mv $@.part $@

test-zero3: $(STAMP) $(ZERO3)
	PATH=$(CURDIR)/$(ZERO3)/bin:$$PATH PYTHONPATH=$(CURDIR)/$(ZERO3) DS_ACCELERATOR=cpu \
	    TORCH_EXTENSIONS_DIR=$(CURDIR)/$(ZERO3)/compiled $(PYTEST) $(ZERO3_TEST)

test-axolotl: $(STAMP)
	$(PYTEST) $(AXOLOTL_TEST)

test-gpu:
	@$(PYTHON) -c "import sys, torch; torch.cuda.is_available() or sys.exit('test-gpu: no CUDA device, nothing tested')"
	$(PYTHON) -m pytest -q -rs tests/gpu

bench: demo
	set -e; for benchmark in $(BENCHMARKS); do .venv/bin/python "benchmarks/$$benchmark.py"; done
	.venv/bin/python -m benchmarks.report

# --find-links is unset so that torch resolves to its default build, which has stricter requirements.
lock: $(STAMP)
	cp $(LOCK) $(LOCK).part
	env -u UV_FIND_LINKS .uv/bin/uv pip compile -q --universal --fork-strategy fewest \
	    --python-version 3.11 --no-annotate --no-header --no-emit-index-url --no-emit-find-links \
	    --overrides requirements/overrides.txt -o $(LOCK).part requirements/requirements.in > /dev/null
	{ sed -n '/^#/p' $(LOCK); \
	  sed -E -e '/^(cuda-|nvidia-)/{/^nvidia-ml-py=/!d}' -e "s/ $(COMMON_MARKER)$$//" $(LOCK).part; \
	} > $(LOCK).new
	rm $(LOCK).part
	mv $(LOCK).new $(LOCK)

clean:
	rm -rf runs/demo .pytest_cache .ruff_cache build sparselong.egg-info
	find . -name __pycache__ -not -path './.venv/*' -not -path './.uv/*' -prune -exec rm -rf {} +
