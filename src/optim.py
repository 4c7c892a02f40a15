"""How weights are updated: parameter groups, Muon beside AdamW, LoRA+, and the course of the learning rate.

    args = TrainingArguments(**optimizer_arguments(config.optim), ...)
    check_installed(args)

    class SFTTrainer(OptimizerHooks, Trainer):  # and sets self.optim = config.optim
        ...

Weight decay is for matrices. Norms, biases and embeddings have none, a head that is tied to the embedding included:
decay would pull what a token means toward nothing wherever the token is rare.
"""

import difflib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import Trainer
from transformers.training_args import OptimizerNames, TrainingArguments

from config.schema import OptimConfig
from src.optimizer_state import keep_options, options_of, other_state
from utils.distributed import shards_weights
from utils.errors import UserError
from utils.logging import get_logger

log = get_logger(__name__)

MUON = "muon"
"""The optimizer that is not one of transformers'."""

STABLE_DECAY = "warmup_stable_decay"

RATES_ASKED = 20_000
"""Most steps whose rate is asked of a schedule, one by one, before a run."""

_LOW_RANK = ("galore", "apollo")  # optimizers that must be told the modules whose gradients they project


def optimizer_arguments(optim: OptimConfig) -> dict[str, Any]:
    """TrainingArguments that say how weights are updated.

    Raises:
        UserError: the installed transformers or torch has no such optimizer, or Muon would see shards of matrices.
    """
    _check_name(optim.name)
    name, settings = _schedule(optim)
    return {
        "optim": OptimConfig().name if optim.name == MUON else optim.name,  # Muon itself is made by muon_with_adamw
        "optim_target_modules": "all-linear" if optim.name.startswith(_LOW_RANK) else None,
        "learning_rate": optim.learning_rate,
        "lr_scheduler_type": name,
        "lr_scheduler_kwargs": settings,
        "warmup_steps": optim.warmup_steps if optim.warmup_steps is not None else (optim.warmup_fraction or 0.0),
        "weight_decay": optim.weight_decay,
        "adam_beta1": optim.beta1,
        "adam_beta2": optim.beta2,
        "adam_epsilon": optim.eps,
        "max_grad_norm": optim.max_grad_norm or 0.0,
    }


def _check_name(name: str) -> None:
    names = sorted({MUON, *(member.value for member in OptimizerNames)})
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(names)}"
        raise UserError(f"optim.name={name} is no optimizer of the installed transformers; {hint}")
    if name != MUON:
        return
    if not hasattr(torch.optim, "Muon"):
        raise UserError(
            f"optim.name={MUON} needs torch.optim.Muon, which torch {torch.__version__} lacks; update torch"
        )
    if shards_weights():
        raise UserError(
            f"optim.name={MUON} needs whole matrices, and FSDP and DeepSpeed give each process a part of them; launch "
            f"with config/accelerate/ddp.yaml, or use optim.name={OptimConfig().name}"
        )


def check_installed(args: TrainingArguments) -> None:
    """Make sure that the optimizer's package is there, before a model is loaded.

    Raises:
        UserError: transformers cannot make the optimizer; its own words say what to install.
    """
    stand_in = torch.nn.Sequential(torch.nn.Linear(1, 1))  # some optimizers are made for a model's linear layers
    try:
        Trainer.get_optimizer_cls_and_kwargs(args, stand_in)
    except (ImportError, ValueError, NotImplementedError) as error:
        name = OptimizerNames(args.optim).value
        raise UserError(
            f"optim.name={name} cannot be used here: {error}; change that, or use optim.name={OptimConfig().name}"
        ) from error


def _schedule(optim: OptimConfig) -> tuple[str, dict[str, Any]]:
    """transformers' name of a schedule, and what it must be told beside the steps of warmup and of all."""
    floor = optim.min_lr_fraction
    if optim.name.startswith("schedule_free"):
        return "constant", {}  # such optimizers warm up by themselves
    if optim.schedule == STABLE_DECAY:
        # 1 - sqrt ends lower than a line or a cosine (arXiv:2405.18392, section 3).
        return STABLE_DECAY, {"decay_type": "1-sqrt", "min_lr_ratio": floor}
    if optim.schedule == "constant":
        return "constant_with_warmup", {}
    if not floor:
        return optim.schedule, {}
    if optim.schedule == "cosine":
        return "cosine_with_min_lr", {"min_lr_rate": floor}
    return "polynomial", {"power": 1.0, "lr_end": floor * optim.learning_rate}  # a line that ends above 0


def decay_steps(optim: OptimConfig, *, steps: int, warmup_steps: int) -> int:
    """Steps at the end of a run in which `warmup_stable_decay` lowers the rate: at least 1, and none of the warmup's.

    Args:
        steps: of the whole run.
    """
    return max(1, min(round(optim.decay_fraction * steps), steps - warmup_steps))


def _embeddings(model: torch.nn.Module) -> set[int]:
    """Ids of the weights that stand in embeddings."""
    modules = (module for module in model.modules() if isinstance(module, torch.nn.Embedding))
    return {id(weight) for module in modules for weight in module.parameters(recurse=False)}


def _dimensions(weight: torch.nn.Parameter) -> int:
    """Dimensions of a weight; DeepSpeed's ZeRO-3 leaves an empty one in its place, and its shape beside it."""
    return len(getattr(weight, "ds_shape", weight.shape))


def decayed_names(model: torch.nn.Module) -> list[str]:
    """Names of the parameters that weight decay is for: those of two dimensions or more outside norms and embeddings.

    A model's own mark of a parameter as one to spare, `_no_weight_decay`, is kept.
    """
    spared = _embeddings(model)
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            spared |= {id(weight) for weight in module.parameters(recurse=False)}
    return [
        name
        for name, weight in model.named_parameters()
        if _dimensions(weight) >= 2
        and id(weight) not in spared
        and "lora_embedding" not in name
        and "trainable_tokens" not in name  # rows of an embedding, and of the head beside it
        and not name.endswith("bias")
        and not getattr(weight, "_no_weight_decay", False)
    ]


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for some parameter groups and AdamW for the others, with one state and one list of groups.

    So schedulers, gradient clipping and checkpoints see a single optimizer. As torch's fused AdamW it has a step change
    nothing where its attribute `found_inf`, a scalar on the device, is there and 1.
    """

    def __init__(self, muon_groups: list[dict[str, Any]], adamw_groups: list[dict[str, Any]], *, lr: float) -> None:
        """
        Args:
            muon_groups: matrices, with torch.optim.Muon's settings; at least one group.
            adamw_groups: all else, with torch.optim.AdamW's settings; at least one group.
            lr: peak rate of both, which schedulers scale.
        """
        muon, adamw = torch.optim.Muon(muon_groups, lr=lr), torch.optim.AdamW(adamw_groups, lr=lr)
        self._muon, self._adamw = muon, adamw
        super().__init__([*muon.param_groups, *adamw.param_groups], {"lr": lr})
        self._share()

    def _share(self) -> None:
        """Let both optimizers work on this one's groups and state."""
        self._muon.param_groups = [group for group in self.param_groups if _is_muon(group)]
        self._adamw.param_groups = [group for group in self.param_groups if not _is_muon(group)]
        self._muon.state = self._adamw.state = self.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a group with Muon's settings is Muon's."""
        super().add_param_group(param_group)
        self._share()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, for both optimizers."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the weights that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None:
            self._muon.step()
            self._adamw.step()
            return loss
        self._muon_step_unless(found_inf)
        self._adamw.grad_scale, self._adamw.found_inf = None, found_inf
        self._adamw.step()
        del self._adamw.grad_scale, self._adamw.found_inf
        return loss

    def _muon_step_unless(self, found_inf: torch.Tensor) -> None:
        """Muon's step, matrix by matrix, each taken back where `found_inf` is 1. So no more than one is held twice,
        and the device is not waited for."""
        groups = self._muon.param_groups
        for group in groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                before = weight.clone()
                momentum = self.state[weight].get("momentum_buffer")
                momentum = torch.zeros_like(weight.grad) if momentum is None else momentum.clone()
                self._muon.param_groups = [{**group, "params": [weight]}]
                self._muon.step()
                after = self.state[weight]["momentum_buffer"]
                for now, then in ((weight, before), (after, momentum)):
                    torch.where(found_inf.bool(), then, now, out=now)
        self._muon.param_groups = groups


def _is_muon(group: dict[str, Any]) -> bool:
    return "ns_steps" in group


def muon_with_adamw(model: torch.nn.Module, optim: OptimConfig) -> MuonWithAdamW:
    """Muon for the matrices of the layers; AdamW for the embeddings, the head, and what is no matrix.

    Muon's update is scaled to the size of AdamW's (arXiv:2502.16982), so that one learning rate and one weight decay
    serve both.

    Raises:
        UserError: the model has no matrix that Muon could train.
    """
    head = model.get_output_embeddings()
    apart = _embeddings(model) | {id(weight) for weight in (head.parameters() if head is not None else ())}
    decayed = set(decayed_names(model))
    groups: dict[str, list[torch.nn.Parameter]] = {"muon": [], "decayed": [], "spared": []}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            layer_matrix = name in decayed and weight.ndim == 2 and id(weight) not in apart
            groups["muon" if layer_matrix else "decayed" if name in decayed else "spared"].append(weight)
    if not groups["muon"]:
        raise UserError(
            f"optim.name={MUON} found no matrix in the layers of {type(model).__name__} that trains; use "
            f"optim.name={OptimConfig().name}"
        )
    adam = {"betas": (optim.beta1, optim.beta2), "eps": optim.eps, "fused": True}
    decay = optim.weight_decay
    return MuonWithAdamW(
        [{"params": groups["muon"], "weight_decay": decay, "adjust_lr_fn": "match_rms_adamw"}],
        [
            {"params": groups["decayed"], "weight_decay": decay, **adam},
            {"params": groups["spared"], "weight_decay": 0.0, **adam},
        ],
        lr=optim.learning_rate,
    )


def raise_rate_of_lora_b(optimizer: torch.optim.Optimizer, model: torch.nn.Module, ratio: float) -> None:
    """Give LoRA's B matrices groups of their own, with `ratio` times the learning rate (LoRA+, arXiv:2402.12354).

    Call it before a scheduler is made. A ratio of 1 changes nothing.
    """
    if ratio == 1.0:
        return
    ids = {id(weight) for name, weight in model.named_parameters() if "lora_B" in name or "lora_embedding_B" in name}
    for group in list(optimizer.param_groups):
        raised = [weight for weight in group["params"] if id(weight) in ids]
        if raised:
            group["params"] = [weight for weight in group["params"] if id(weight) not in ids]
            optimizer.add_param_group({**group, "params": raised, "lr": ratio * group["lr"]})


def group_table(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> list[str]:
    """A head, and a line for each parameter group that is not empty; to be made before warmup sets rates to 0.

    Empty where the optimizer shows none of its groups, as one that works layer by layer does.
    """
    names = {id(weight): name for name, weight in model.named_parameters()}
    rows = [("optimizer", "tensors", "parameters", "learning rate", "weight decay", "first tensor")]
    for group in optimizer.param_groups:
        weights = [weight for weight in group["params"] if id(weight) in names]
        if weights:
            mixed = isinstance(optimizer, MuonWithAdamW)
            rows.append(
                (
                    ("Muon" if _is_muon(group) else "AdamW") if mixed else type(optimizer).__name__,
                    f"{len(weights):,}",
                    f"{sum(getattr(weight, 'ds_numel', weight.numel()) for weight in weights):,}",
                    f"{group['lr']:.4g}",
                    f"{group.get('weight_decay', 0.0):.4g}",
                    names[id(weights[0])],
                )
            )
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(row[column].rjust(widths[column]) for column in range(1, 5)), row[5]])
        for row in rows
    ]
    return lines if len(rows) > 1 else []


class OptimizerHooks:
    """The methods of transformers' Trainer that make the optimizer and its schedule; stands before Trainer as a base.

    Attributes:
        optim: the section that Trainer's arguments were made from.
    """

    optim: OptimConfig

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Names of the parameters that weight decay is for."""
        return decayed_names(model)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """As Trainer's, with Muon and LoRA+ where they are asked for, and a table of the groups in the log.

        Raises:
            UserError: the model has no matrix that Muon could train.
        """
        if self.optimizer is None:
            model = self.model if model is None else model
            if self.optim.name == MUON:
                self.optimizer = muon_with_adamw(model, self.optim)
            else:
                super().create_optimizer(model)
            raise_rate_of_lora_b(self.optimizer, model, self.optim.lora_plus_ratio)
            for line in group_table(self.optimizer, model):
                log.info("%s", line)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """As Trainer's, with the steps of the decay, which depend on those of the run."""
        if self.args.lr_scheduler_type == STABLE_DECAY:
            warmup_steps = self.args.get_warmup_steps(num_training_steps)
            steps = decay_steps(self.optim, steps=num_training_steps, warmup_steps=warmup_steps)
            self.args.lr_scheduler_kwargs["num_decay_steps"] = steps
        return super().create_scheduler(num_training_steps, optimizer)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As Trainer's, which would go on with the checkpoint's rates, decay and betas, whatever is asked for now.

        Raises:
            UserError: the state is that of another optimizer, or of other weights.
        """
        given = options_of(self.optimizer)
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            raise other_state(checkpoint, error) from error
        if checkpoint is not None and not self.is_deepspeed_enabled:
            keep_options(self.optimizer, self.lr_scheduler, given, checkpoint)

    def learning_rates(self, steps: int) -> np.ndarray:
        """The rate that each step of a run will take, by the run's own schedule, float64, (steps,).

        Of more than `RATES_ASKED` steps, those between are interpolated: of a million each would take 14 s.
        """
        stand_in = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=self.args.learning_rate)
        kept, self.lr_scheduler = self.lr_scheduler, None
        [factor] = self.create_scheduler(steps, stand_in).lr_lambdas
        self.lr_scheduler = kept
        asked = np.unique(np.linspace(0, steps - 1, min(steps, RATES_ASKED)).round().astype(int))
        factors = [factor(step) for step in asked.tolist()]
        return self.args.learning_rate * np.interp(np.arange(steps), asked, factors)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; a schedule-free optimizer then leaves its averaged weights in the model."""
        output = super().train(*args, **kwargs)
        if hasattr(self.optimizer, "eval"):
            self.optimizer.eval()
        return output
