"""GlobalOptimManager: which parameters have states of other bits than their optimizer, by a mark on the parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from opt8bit.integrations.reading import read


class GlobalOptimManager:
    """Stands in for ``bitsandbytes.optim.GlobalOptimManager``, of which there is one.

    ``optim_bits`` becomes the attribute ``state_bits`` of the parameter. Every optimizer of this package honours it
    when it makes states, in the first step. So overrides may come after the optimizer was made.
    """

    _instance: ClassVar[GlobalOptimManager | None] = None
    _before: WeakIdKeyDictionary  # by parameter with an override: its attributes named state_bits before it

    def __init__(self) -> None:
        raise RuntimeError("call GlobalOptimManager.get_instance() instead: there is one for all optimizers")

    @classmethod
    def get_instance(cls) -> GlobalOptimManager:
        """Returns the one that there is."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance._before = WeakIdKeyDictionary()
        return cls._instance

    def initialize(self) -> None:
        """Takes back every override; states that are there stay as they are."""
        for param, before in list(self._before.items()):
            vars(param).pop("state_bits", None)
            vars(param).update(before)
        self._before.clear()

    def register_parameters(self, params: Iterable[Any]) -> None:
        """Does nothing: overrides are on the parameters themselves, which need not be known beforehand."""

    def override_config(
        self,
        parameters: Tensor | Iterable[Tensor],
        key: str | None = None,
        value: Any = None,
        key_value_dict: Mapping[str, Any] | None = None,
    ) -> None:
        """Gives parameters states of other bits than their optimizer has.

        Args:
            parameters: one or several.
            key, value: ``"optim_bits"``, and 8 or 32; strings are read as numbers.
            key_value_dict: the same as a mapping, instead.

        Raises:
            ValueError: another key, a value that it cannot have, or both a key and a mapping.
            TypeError: one of the parameters is no tensor. In either case nothing has been changed.
        """
        if key is not None and key_value_dict is not None:
            raise ValueError(f"give key and value, or key_value_dict, got {key!r} and {key_value_dict!r}")
        bits = checked_config({key: value} if key is not None else key_value_dict or {})
        params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        for param in params:
            if not isinstance(param, Tensor):
                raise TypeError(f"parameters must be tensors, got {param!r}")
        for param in params:
            if param not in self._before:
                self._before[param] = {name: old for name, old in vars(param).items() if name == "state_bits"}
            param.state_bits = bits  # type: ignore[attr-defined]

    def register_module_override(self, module: nn.Module, param_name: str, config: Mapping[str, Any]) -> None:
        """Does as :meth:`override_config` with a module's parameter.

        Args:
            module: that has it.
            param_name: its name there.
            config: ``{"optim_bits": 8}`` or 32.
        """
        self.override_config(getattr(module, param_name), key_value_dict=config)


def checked_config(config: Mapping[str, Any]) -> int:
    """Returns the bits that an override asks for.

    Raises:
        ValueError: it asks for something else.
    """
    others = sorted(set(config) - {"optim_bits"})
    if others:
        raise ValueError(f"only optim_bits can be overridden, got {', '.join(others)}: give those in a parameter group")
    bits = read(config.get("optim_bits"))
    if bits not in (8, 32):
        raise ValueError(f"optim_bits must be 8 or 32, got {bits!r}")
    return bits
