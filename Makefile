# make test    set up .venv and run the tests, WORKERS (default 2) at a time
# make demo    set up .venv, convert the bundled storyteller (or CHECKPOINT=…), measure it on a text, let it write,
#              chat if there is a terminal
# make pictures  the pictures of README (needs tmux, chromium and chromium-driver)
# make coverage  the tests, and how much of the code they reach: fails below the floor in .coveragerc
# make fuzz    damaged inputs of every kind, RWKV_FUZZ of each (default 2000)
# make lint    formatting, style, types
# EXTRAS=dev,reference adds torch and the reference package to the tests

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev
WORKERS ?= 2
TEXT ?= docs/story.txt
CHECKPOINT ?= rwkv_cli/storyteller.pth
BIN := $(VENV)/bin

.PHONY: setup test coverage fuzz lint demo docs pictures clean

setup: $(VENV)/installed-$(EXTRAS)

$(VENV)/installed-$(EXTRAS): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rwkv needs Python 3.11 or newer; name one: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	touch $@

test: setup
	$(BIN)/pytest -n $(WORKERS) --dist worksteal

coverage: setup
	$(BIN)/coverage run $(BIN)/pytest
	$(BIN)/coverage report

fuzz: setup
	RWKV_FUZZ=$${RWKV_FUZZ:-2000} $(BIN)/pytest tests/fuzz -s

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/links.py
	cd .links && ../$(BIN)/mypy --config-file ../pyproject.toml -p rwkv_cli

docs: setup
	$(BIN)/python tools/make_docs.py

pictures: setup
	$(BIN)/python tools/make_pictures.py
	$(BIN)/python tools/make_page_picture.py

demo: setup
	mkdir -p demo
	$(BIN)/rwkv convert "$(CHECKPOINT)" demo/model.safetensors --force
	$(BIN)/rwkv ppl $(TEXT) -m demo/model.safetensors --limit 2000
	$(BIN)/rwkv generate "Once upon a time" -m demo/model.safetensors --max-tokens 200
	@if test -t 0; then $(BIN)/rwkv chat -m demo/model.safetensors; fi

clean:
	rm -rf $(VENV) .links build dist demo *.egg-info .coverage
