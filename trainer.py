"""TRL's trainer as train.py uses it: the loss at the answers alone, label scoring, checkpoints, and its callbacks."""

import functools
from pathlib import Path

import torch
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils import reduce
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from torch.nn.utils import get_total_norm
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from trl import SFTTrainer

import checkpoints
import processes
from command_line import UserError
from metrics import classification_metrics, predicted_labels
from shared_prefix import label_log_probs
from step_graph import GraphedStep

RANDOM_STATES = "random_states.safetensors"  # of all processes, in a checkpoint of several
SPLIT_NAMES = {"train": "train", "eval": "validation"}  # the trainer's names, and ours


class AnswerLossTrainer(SFTTrainer):
    """TRL's SFTTrainer with the loss at the answers' positions alone, for batches of shared_prefix.py.

    Its own loss projects every position onto the vocabulary where there is no Triton: on a CPU, half of a step's time
    goes into logits of prompt tokens that nobody asked for. `scored` is {"train": rows, "eval": rows}, each encoded,
    to be scored at every evaluation; `answers` is {label: ids}. `on_scores` is called with the log-probabilities (rows,
    labels) of the validation rows at every evaluation, and then nothing is printed. With `graphed` a step runs from a
    CUDA graph. `best` is the run's KeepBest or None: its weights belong to a checkpoint.

    Several processes share the rows of a batch (`OwnRows`), whose size is what it is with one: loss and gradients are
    added up, so that all of them take the step that one process would take. The first one writes.
    """

    def __init__(self, *args, scored, answers, on_scores=None, best=None, graphed=False, **kwargs):
        super().__init__(*args, **kwargs)
        # No DistributedDataParallel: a step recorded as a CUDA graph runs none of its hooks, and an adapter's gradients
        # are few enough to be added up at once, in `_clip_grad_norm`.
        self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)
        self.scored = scored
        self.on_scores = on_scores
        if on_scores:
            self.remove_callback(PrinterCallback)
        self.answers = answers
        self.best = best
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.graphed_step = GraphedStep(self._step, self.trained) if graphed else None
        self.finite = StopAtNaN(self)
        for callback in (self.finite, LossSum(self), *([best] if best else [])):
            self.add_callback(callback)

    def get_train_dataloader(self):
        """Return the batches, all of them in every process; transformers would deal out, and fill up, whole ones."""
        dataloader = super().get_train_dataloader()
        sampler = dataloader.batch_sampler
        if isinstance(sampler, BatchSamplerShard):
            sampler.num_processes, sampler.process_index, sampler.even_batches = 1, 0, False
        if not processes.is_first():
            set_seed(self.args.seed + self.args.process_index)  # dropout's; the order of rows is drawn already
        return dataloader

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the mean cross-entropy in nats over the batch's answer tokens (or over `num_items_in_batch`)."""
        following = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
        labels = following[:, inputs["logits_to_keep"]]
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        outputs = model(**rest, use_cache=False)
        total = cross_entropy(outputs.logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
        loss = total / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Add the gradients of one batch and return its loss, from a recording of that step on a GPU."""
        if self.graphed_step is None or num_items_in_batch is None:
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            if not model.training:
                model.train()
            count = {"num_items_in_batch": torch.as_tensor(num_items_in_batch, device=self.args.device)}
            loss = self.graphed_step(self._prepare_inputs(inputs) | count)
        return reduce(loss, "sum") if processes.count() > 1 else loss

    @torch.no_grad()
    def _clip_grad_norm(self, model):
        """Add up the gradients of all processes and clip them; return their norm before that."""
        if processes.count() > 1:
            gradients = [parameter.grad for parameter in self.trained]
            total = reduce(torch.cat([gradient.flatten() for gradient in gradients]), "sum")
            parts = total.split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))
        return super()._clip_grad_norm(model)

    def _step(self, inputs):
        batch = dict(inputs)
        num_items_in_batch = batch.pop("num_items_in_batch")
        with self.compute_loss_context_manager():
            loss = self.compute_loss(self.model_wrapped, batch, num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach()

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Score every label of the rows in `scored`; log and return accuracy, macro-F1 and the validation loss.

        The loss is the mean over the true answers' tokens, in nats, whatever the batches.
        """
        self.finite.check()
        self.model.eval()
        metrics = {}
        for split, rows in self.scored.items():
            with self.compute_loss_context_manager():
                log_probs = label_log_probs(
                    self.model,
                    [row["prompt_ids"] for row in rows],
                    list(self.answers.values()),
                    batch_size=self.args.per_device_eval_batch_size,
                    description=None if self.on_scores else f"scoring {SPLIT_NAMES[split]} rows",
                )
            labels = list(self.answers)
            truth = [row["label_text"] for row in rows]
            if split == "eval":
                if self.on_scores:
                    self.on_scores(log_probs)
                true_columns = torch.tensor([labels.index(label) for label in truth])
                tokens = sum(len(row["answer_ids"]) for row in rows)
                metrics["eval_loss"] = -log_probs.gather(1, true_columns[:, None]).double().sum().item() / tokens
            numbers = classification_metrics(labels, truth, predicted_labels(labels, log_probs))
            metrics |= {f"{split}_{name}": numbers[name] for name in ("accuracy", "macro_f1")}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model, trial):
        """Write a checkpoint, whole or not at all; transformers resumes from what it writes itself."""
        self.finite.check()
        if not processes.is_first():
            super(SFTTrainer, self)._save_checkpoint(model, trial)  # writes nothing; the first gets its random state
            return
        folder = Path(self.args.output_dir)
        with checkpoints.checkpoint(folder, self.state.global_step) as part:
            self.args.output_dir = str(part)
            try:
                super(SFTTrainer, self)._save_checkpoint(model, trial)  # TRL's adds a model card, of another model
            finally:
                self.args.output_dir = str(folder)
            written = part / f"checkpoint-{self.state.global_step}"
            for file in written.iterdir():
                file.rename(part / file.name)
            written.rmdir()
            if self.best:
                self.best.save(part)

    def _save_rng_state(self, output_dir):
        """Write the random states, those of several processes to one file."""
        if processes.count() == 1:
            super()._save_rng_state(output_dir)
            return
        states = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            states["cuda"] = torch.cuda.get_rng_state()
        gathered = processes.gathered(states)
        if processes.is_first():
            named = {f"{name} {number}": of[name] for number, of in enumerate(gathered) for name in of}
            save_file(named, Path(output_dir, RANDOM_STATES))

    def _load_rng_state(self, checkpoint):
        """Restore this process's random states; a checkpoint of another number of processes leaves them as they are."""
        file = Path(checkpoint or "", RANDOM_STATES)
        if processes.count() == 1 or not file.is_file():
            super()._load_rng_state(checkpoint)
            return
        states, number = load_file(file), self.args.process_index
        if f"cpu {processes.count() - 1}" in states and f"cpu {processes.count()}" not in states:
            torch.set_rng_state(states[f"cpu {number}"])
            if torch.cuda.is_available():
                torch.cuda.set_rng_state(states[f"cuda {number}"])

    def _save(self, output_dir=None, state_dict=None):
        """Write the adapter alone: no pickled options."""
        if processes.is_first():
            self.model.save_pretrained(output_dir, save_embedding_layers=False)

    def train(self, *args, **kwargs):
        """Train; what an error says then is on a line of its own, not behind a progress bar."""
        try:
            return super().train(*args, **kwargs)
        finally:
            for callback in self.callback_handler.callbacks:
                if bar := getattr(callback, "training_bar", None):
                    bar.close()

    def go_on(self, checkpoint):
        """Train from a checkpoint on; from one after the last step, which transformers would overstep, only load it."""
        if self.best:
            self.best.load(checkpoint)
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if self.state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]:
            self._load_from_checkpoint(str(checkpoint))
        else:
            self.train(resume_from_checkpoint=str(checkpoint))


class StopAtNaN(TrainerCallback):
    """Ends the run at the step after which its loss or a weight of the adapter is NaN or infinite.

    On a GPU the answer is read two steps later, when it is there: waiting for it would cost a sixth of the time. Before
    anything is scored or saved, all answers are waited for.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.pending = []

    def on_step_end(self, args, state, control, **kwargs):
        # Of one weight that is not finite, the norm is not; and so with the sum of losses.
        finite = torch.stack([self.trainer._tr_loss, get_total_norm(self.trainer.trained)]).isfinite()
        event = None
        if finite.is_cuda:
            finite = torch.empty(2, dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.pending.append((state.global_step, finite, event))
        self.check(leave=0 if event is None else 2)

    def check(self, leave=0):
        """Raise UserError for the first step so far, but the last `leave` ones, that went wrong."""
        while len(self.pending) > leave:
            step, finite, event = self.pending.pop(0)
            if event is not None:
                event.synchronize()
            if not finite.all():
                what = "adapter's weights" if finite[0] else "loss"
                raise UserError(
                    f"step {step}: the {what} became NaN or infinite, so training stopped and no adapter was written; "
                    f"lower --learning_rate (it is {self.trainer.args.learning_rate:g}) or --lora_alpha, or raise "
                    "--train_batch_size"
                )


class SaveCheckpoints(TrainerCallback):
    """Has a checkpoint written every `every` steps, or where that is None after an epoch, and after the last step.

    At an epoch's end only after its evaluation: resumed from between the two, a run would leave the evaluation out.
    """

    def __init__(self, every):
        self.every = every

    def _due(self, state):
        return state.global_step == state.max_steps or (self.every and state.global_step % self.every == 0)

    def on_step_end(self, args, state, control, **kwargs):
        if args.eval_strategy == "steps" or not state.epoch.is_integer():
            control.should_save = bool(self._due(state))

    def on_epoch_end(self, args, state, control, **kwargs):
        if args.eval_strategy == "epoch":
            control.should_save = bool(self.every is None or self._due(state) or control.should_training_stop)


class Remembered(ExportableState):
    """A callback whose attributes named in `remembered` are part of a checkpoint and restored from it."""

    remembered = ()

    def state(self):
        return {"args": {}, "attributes": {name: getattr(self, name) for name in self.remembered}}

    def recall(self, state):
        for name, value in state.stateful_callbacks[type(self).__name__]["attributes"].items():
            setattr(self, name, value)


class LossSum(Remembered, TrainerCallback):
    """Keeps the sum of losses since the last logged line, which transformers forgets in a checkpoint between lines."""

    remembered = ("loss_sum", "logged_step")

    def __init__(self, trainer):
        self.trainer, self.loss_sum, self.logged_step = trainer, 0.0, 0

    def state(self):
        if hasattr(self.trainer, "_tr_loss"):  # not before training begins
            self.loss_sum = self.trainer._tr_loss.item()
            self.logged_step = self.trainer._globalstep_last_logged
        return super().state()

    def on_train_begin(self, args, state, control, **kwargs):
        self.recall(state)
        self.trainer._tr_loss.fill_(self.loss_sum)
        self.trainer._globalstep_last_logged = self.logged_step


class EvaluateAtEnd(TrainerCallback):
    """Evaluates and logs after the last step, which regular steps may miss."""

    def on_step_end(self, args, state, control, **kwargs):
        if args.eval_strategy == "steps" and state.global_step == state.max_steps:
            control.should_evaluate = control.should_log = True


class KeepBest(TrainerCallback):
    """Keeps the adapter's weights of the evaluation with the highest validation macro-F1, the first of equals."""

    FILE = "best_weights.safetensors"

    def __init__(self):
        self.macro_f1, self.step, self.weights = -1.0, None, None

    def on_evaluate(self, args, state, control, metrics=None, model=None, **kwargs):
        if metrics["eval_macro_f1"] > self.macro_f1:
            self.macro_f1, self.step = metrics["eval_macro_f1"], state.global_step
            trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
            self.weights = {name: parameter.detach().cpu().clone() for name, parameter in trained.items()}

    def restore(self, model):
        """Put the kept weights into `model`."""
        model.load_state_dict(self.weights, strict=False)

    def save(self, folder):
        """Write what is kept to a checkpoint's folder, if there is anything yet."""
        if self.weights:
            about = {"step": str(self.step), "macro_f1": repr(self.macro_f1)}
            save_file(self.weights, folder / self.FILE, metadata=about)

    def load(self, folder):
        """Read back what `save` wrote, if it did."""
        if (folder / self.FILE).is_file():
            with safe_open(folder / self.FILE, framework="pt") as file:
                self.weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
                about = file.metadata()
            self.step, self.macro_f1 = int(about["step"]), float(about["macro_f1"])


class EarlyStopping(Remembered, EarlyStoppingCallback):
    """transformers' EarlyStoppingCallback without its advice to use checkpoints: KeepBest does that here."""

    remembered = ("early_stopping_patience_counter",)

    def on_train_begin(self, args, state, control, **kwargs):
        self.recall(state)

    def on_evaluate(self, args, state, control, **kwargs):
        super().on_evaluate(args, state, control, **kwargs)
        if control.should_training_stop and state.global_step < state.max_steps:
            print(f"Stopped early: no higher validation macro-F1 in {self.early_stopping_patience} evaluations")
