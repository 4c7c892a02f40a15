"""A base model without its weights, beside which PEFT sets an adapter, and which takes its weights a module at a time.

    outline = Outline(settings, adapter)
    with outline.streamed(tensors):             # each module's weights are there while it computes
        outline.model(ids).logits
    outline.merged_unit("model.layers.0.self_attn.q_proj", tensors)

A weight's place is held by one zero that is seen as many. PEFT, which knows nothing of that, makes the adapter's layers
and loads them, computes with them, and merges them.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from src.checkpoints.checkpoint import LazyTensor
from src.merging.adapter import AdapterFolder
from utils.errors import UserError

PREFIX = "base_model.model."
"""What PEFT puts before the base's names."""


class Outline:
    """A base without weights, and an adapter with its own."""

    def __init__(self, settings: PreTrainedConfig, adapter: AdapterFolder) -> None:
        """
        Args:
            settings: of the base, with the vocabulary that it had when the adapter was saved.
        Raises:
            UserError: the adapter is not of this base, or its file and its config differ.
        """
        self._adapter = adapter
        base = _without_weights(settings)
        self.names = {name: id(weight) for name, weight in base.named_parameters(remove_duplicate=False)}
        """A weight's names in the base; two that are tied have one id."""
        self._places = {id(weight): weight for weight in base.parameters()}
        self.sources = {id(weight): name for name, weight in base.named_parameters()}
        """The name of each weight's own tensor in a checkpoint, by id."""
        self.transposed = {f"{name}.weight" for name, part in base.named_modules() if isinstance(part, Conv1D)}
        """Weights that stand as (inputs, outputs), which bitsandbytes turns to hold them."""
        self.model, self.whole = with_adapter(base, adapter, self._names_of)
        self.units = dict(adapter_units(self.model))
        if not self.units:
            raise UserError(
                f"{adapter.path} has peft_type={adapter.config.peft_type}, which has no layers beside the base's that "
                "could be merged into them; keep the adapter"
            )

    def _names_of(self, weight: torch.nn.Parameter) -> str | None:
        return self.sources.get(id(weight))

    def names_in(self, unit: str) -> list[str]:
        """The base's names of the weights that a unit holds."""
        return [name for name in self.names if name.startswith(f"{unit}.")]

    def source_of(self, name: str) -> str:
        """The name of the tensor that a weight is stored as, which for the second of two tied ones is the first's."""
        return self.sources[self.names[name]]

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of a weight of the base."""
        return tuple(self._places[self.names[name]].shape)

    def merged_unit(self, unit: str, tensors: Mapping[str, LazyTensor]) -> dict[str, torch.Tensor]:
        """What PEFT makes of a unit's weights in float32 when it merges the adapter into them.

        Args:
            tensors: the base's, by the names of `sources`.
        Returns:
            Tensors by their names in the base.
        """
        module = self.units[unit]
        # The copy takes the base's weights in place of those that hold their places, and its own of the adapter's.
        copies: dict[int, Any] = dict(self._places)
        for weight in module.parameters():
            if id(weight) in self._places:
                copies[id(weight)] = self._loaded(id(weight), tensors)
        return _merged(copy.deepcopy(module, copies), unit, self._adapter)

    def _loaded(self, place: int, tensors: Mapping[str, LazyTensor]) -> torch.nn.Parameter:
        return torch.nn.Parameter(tensors[self.sources[place]].load().float(), requires_grad=False)

    @contextlib.contextmanager
    def streamed(self, tensors: Mapping[str, LazyTensor]) -> Iterator[None]:
        """Give each module its weights in float32 for the length of its call, while the context lasts."""
        handles = []
        for module in self._callers():
            held: list[tuple[torch.nn.Module, str, torch.nn.Parameter]] = []

            def take(module: torch.nn.Module, _: Any, held: list = held) -> None:
                for part in module.modules():
                    for name, weight in list(part.named_parameters(recurse=False)):
                        if id(weight) in self._places:
                            held.append((part, name, weight))
                            setattr(part, name, self._loaded(id(weight), tensors))

            def give_back(_: torch.nn.Module, __: Any, ___: Any, held: list = held) -> None:
                while held:
                    part, name, weight = held.pop()
                    setattr(part, name, weight)

            handles += [
                module.register_forward_pre_hook(take),
                module.register_forward_hook(give_back, always_call=True),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _callers(self) -> Iterator[torch.nn.Module]:
        """The modules that take weights: an adapter's unit for all below it, any other for its own."""
        below = tuple(f"{unit}." for unit in self.units)
        for name, module in self.model.get_base_model().named_modules():
            own = any(id(weight) in self._places for weight in module.parameters(recurse=False))
            if name in self.units or (own and not name.startswith(below)):
                yield module


def _without_weights(settings: PreTrainedConfig) -> PreTrainedModel:
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    model.tie_weights()
    places: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            zeros = torch.zeros(()).expand(weight.shape)
            setattr(module, name, places.setdefault(id(weight), torch.nn.Parameter(zeros, requires_grad=False)))
    return model.eval()


def adapter_units(model: PeftModel) -> Iterator[tuple[str, torch.nn.Module]]:
    """The modules that PEFT put in the place of the base's, outermost first, by the names of those."""
    found: list[str] = []
    for name, module in model.get_base_model().named_modules():
        replaced = hasattr(module, "unload_and_optionally_merge_module") or hasattr(module, "get_base_layer")
        if replaced and not name.startswith(tuple(f"{unit}." for unit in found)):
            found.append(name)
            yield name, module


def _merged(module: torch.nn.Module, unit: str, adapter: AdapterFolder) -> dict[str, torch.Tensor]:
    try:
        if hasattr(module, "unload_and_optionally_merge_module"):
            base = module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        else:
            module.merge(safe_merge=True)
            base = module.get_base_layer()
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise UserError(f"{adapter.path}: PEFT does not merge {unit} ({error}); keep the adapter") from error
    return {f"{unit}.{name}": weight.detach() for name, weight in base.named_parameters()}


def with_adapter(
    base: PreTrainedModel, adapter: AdapterFolder, base_name: Any
) -> tuple[PeftModel, dict[str, torch.Tensor]]:
    """The base with the adapter's layers, loaded from its file.

    Args:
        base_name: a weight of the base -> its name there; None for one that is not the base's.
    Returns:
        The model, and the base's weights that the file holds whole, by their names in the base, which are left out.
    Raises:
        UserError: the adapter is not of this base, or its file and its config differ.
    """
    config = copy.deepcopy(adapter.config)
    config.inference_mode = True
    config.base_model_name_or_path = base.name_or_path  # which PEFT would put there, with a warning
    try:
        model = get_peft_model(base, config)
    except (ValueError, RuntimeError, TypeError) as error:
        raise UserError(
            f"{adapter.path}, an adapter of {adapter.named_base}, does not fit the base {adapter.base} "
            f"({' '.join(str(error).split())[:300]}); give its own base with --base-model"
        ) from error
    of_base = {
        name: own
        for name, weight in model.named_parameters(remove_duplicate=False)
        if (own := base_name(weight)) is not None
    }
    found = adapter.shapes()
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    expected = {name: tuple(weight.shape) for name, weight in own.items() if name not in of_base}
    _check_shapes(adapter, expected, {name: shape for name, shape in found.items() if name not in of_base})
    weights = {name: adapter.tensor(name) for name in expected}
    set_peft_model_state_dict(model, weights)
    return model.eval(), {of_base[name]: adapter.tensor(name) for name in found if name in of_base}


def _check_shapes(
    adapter: AdapterFolder, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unknown:
        which = " and ".join(
            f"{what} {len(names)} ({', '.join(names[:3])})"
            for what, names in (("lacks", missing), ("has more than it", unknown))
            if names
        )
        raise UserError(
            f"{adapter.weights} is not what adapter_config.json describes for the base {adapter.base}: of its tensors "
            f"it {which}. The adapter names {adapter.named_base} as its base; fetch it again, or give that with "
            "--base-model"
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise UserError(
                f"{adapter.weights}: {name} has shape {found[name]}, while adapter_config.json and the base "
                f"{adapter.base} ask for {shape}. The adapter names {adapter.named_base} as its base; give that with "
                "--base-model, or the adapter's own adapter_config.json"
            )
