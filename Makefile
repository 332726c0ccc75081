# Every target installs what it misses; a second run of it does only what changed.
#
#   make demo    installs, builds, draws out/demo.png and forecasts out/forecast.png with the bundled models
#   make demo-payments   installs, and walks through the credit ledger on a chain of its own
#   make inference   installs, and serves both bundled models at http://127.0.0.1:8100, free for this machine
#   make inference-nvfp4   the same in NVFP4, or what the machine lacks for it
#   make serve-dev   the same with a page that sells: a dev chain, a ledger and a faucet of its own
#   make test    the same as demo, then runs every test
#   make build   the library and the tests' programs in build/
#   make clean   removes what the other targets made, .venv/ too

PYTHON ?= python3
TORCH := torch==2.13.0
# Each compiler of a torch header wants a gigabyte or more.
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
# One file a step that has been done.
STAMPS := $(VENV)/stamps

BUILD_PACKAGES := g++ cmake ninja-build pkg-config \
  libwebp-dev libpng-dev libpcre2-dev libutf8proc-dev nlohmann-json3-dev
# Debian's Python comes without what an environment and an extension need; others have it.
PYTHON_PACKAGES = $(shell $(PYTHON) -c "import ensurepip, os, sysconfig; \
  exit(not os.path.exists(os.path.join(sysconfig.get_path('include'), 'Python.h')))" 2>/dev/null || echo python3-venv python3-dev)
TEST_PACKAGES := golang-go valgrind chromium chromium-driver

SOURCES := CMakeLists.txt pyproject.toml $(shell find cmake diffusionz py payments server -type f -not -path '*/__pycache__/*')

.PHONY: demo demo-payments inference inference-nvfp4 serve-dev test build clean

demo: $(STAMPS)/package
	mkdir -p out
	$(BIN)/diffusionz generate "a red circle on a blue background" --seed 7 -o out/demo.png
	$(BIN)/diffusionz forecast airline --horizon 24 -o out/forecast.csv --plot out/forecast.png

demo-payments: $(STAMPS)/payments-package
	$(BIN)/python examples/payments/demo.py

inference: $(STAMPS)/server-package
	$(BIN)/diffusionz serve --free

inference-nvfp4: $(STAMPS)/server-package
	ENABLE_NVFP4=1 $(BIN)/diffusionz serve --free

serve-dev: $(STAMPS)/server-package
	$(BIN)/diffusionz serve --dev

test: $(STAMPS)/tests-package
	$(BIN)/python -m pytest

build: $(STAMPS)/configured
	cmake --build build -j $(JOBS)

clean:
	rm -rf build out $(VENV)

# --- Steps ---

# The programs of tests/ are built in the same folder as the package, so nothing is compiled twice.
$(STAMPS)/package: $(SOURCES) $(STAMPS)/torch
	$(BIN)/pip install --no-build-isolation -C build.tool-args=-j$(JOBS) .
	touch $@

$(STAMPS)/payments-package: $(SOURCES) $(STAMPS)/torch
	$(BIN)/pip install --no-build-isolation -C build.tool-args=-j$(JOBS) ".[payments]"
	touch $@ $(STAMPS)/package

# The server has the ledger within it.
$(STAMPS)/server-package: $(SOURCES) $(STAMPS)/torch
	$(BIN)/pip install --no-build-isolation -C build.tool-args=-j$(JOBS) ".[server]"
	touch $@ $(STAMPS)/package $(STAMPS)/payments-package

$(STAMPS)/tests-package: $(SOURCES) $(wildcard tests/*/*.c tests/*/*.cc) $(STAMPS)/torch
	@$(call install_packages,$(TEST_PACKAGES))
	$(BIN)/pip install --no-build-isolation -C build.tool-args=-j$(JOBS) -C cmake.define.DIFFUSIONZ_TESTS=ON ".[test]"
	touch $@ $(STAMPS)/package $(STAMPS)/payments-package $(STAMPS)/server-package

$(STAMPS)/configured: CMakeLists.txt $(STAMPS)/torch
	cmake -S . -B build -G Ninja -DPython3_EXECUTABLE=$(abspath $(BIN)/python) -DDIFFUSIONZ_TESTS=ON
	touch $@

$(STAMPS)/torch: Makefile
	@$(call install_packages,$(BUILD_PACKAGES) $(PYTHON_PACKAGES))
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS)
	$(BIN)/pip install $(TORCH) "scikit-build-core>=1.1,<2" "cffi>=1.17,<3"
	touch $@

# Installs the Debian packages that are missing, or says how. Elsewhere CMake and the tests say what they miss.
define install_packages
	command -v dpkg-query >/dev/null || exit 0; \
	missing=""; \
	for package in $(1); do \
	  dpkg-query -W -f='$${Status}' $$package 2>/dev/null | grep -q "ok installed" || missing="$$missing $$package"; \
	done; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" != 0 ]; then \
	  echo "missing packages; install them with: sudo apt-get install$$missing" >&2; exit 1; \
	fi; \
	echo "installing$$missing"; \
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing
endef
