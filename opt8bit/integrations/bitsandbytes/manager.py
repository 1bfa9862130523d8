"""GlobalOptimManager: which parameters have states of other bits than their optimizer, by a mark on the parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary


class GlobalOptimManager:
    """Stands in for ``bitsandbytes.optim.GlobalOptimManager``, of which there is one.

    ``optim_bits`` becomes the attribute ``state_bits`` of the parameter. Every optimizer of this package honours it
    when it makes states, in the first step. So overrides may come after the optimizer was made.
    """

    _instance: ClassVar[GlobalOptimManager | None] = None
    _marked: WeakIdKeyDictionary  # whose keys are the parameters with an override

    def __init__(self) -> None:
        raise RuntimeError("call GlobalOptimManager.get_instance() instead: there is one for all optimizers")

    @classmethod
    def get_instance(cls) -> GlobalOptimManager:
        """Returns the one that there is."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance._marked = WeakIdKeyDictionary()
        return cls._instance

    def initialize(self) -> None:
        """Takes back every override; states that are there stay as they are."""
        for param in list(self._marked.keys()):
            vars(param).pop("state_bits", None)
        self._marked.clear()

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
            key, value: ``"optim_bits"``, and 8 or 32.
            key_value_dict: the same as a mapping, instead.

        Raises:
            ValueError: another key, or a value that it cannot have. Nothing has been changed then.
        """
        config = dict(key_value_dict or {})
        if key is not None:
            config[key] = value
        bits = checked_config(config)
        for param in [parameters] if isinstance(parameters, Tensor) else parameters:
            param.state_bits = bits  # type: ignore[attr-defined]
            self._marked[param] = None

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
    bits = config.get("optim_bits")
    if bits not in (8, 32):
        raise ValueError(f"optim_bits must be 8 or 32, got {bits!r}")
    return bits
