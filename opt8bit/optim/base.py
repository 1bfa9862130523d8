"""Optimizer8bit: arguments, state, the one step loop and checkpoints of every optimizer."""

from __future__ import annotations

import warnings
import weakref
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence, Set
from itertools import repeat
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from opt8bit.backends import Backend, GroupUpdate, Rule, can_capture, wanted_backend
from opt8bit.optim import shards
from opt8bit.optim.backward import Backward
from opt8bit.optim.checkpoint import reading
from opt8bit.optim.groups import Policy
from opt8bit.optim.offload import Host, Hosts
from opt8bit.optim.options import DEFAULTS, KEPT, Options, check_options, is_on_device
from opt8bit.optim.plan import Asked, Plan, Work, backend_of, overlapping, refuse_shared
from opt8bit.optim.states import CODED_DTYPES, check, initialized, is_cut, will_be_coded

SUPPORTED_DTYPES = (*CODED_DTYPES, torch.float64, torch.complex64, torch.complex128)

CUT_BLOCKS = (
    "the states of {count} parameters are kept in 32 bits, as shards cut blocks of block_size={block_size} elements; "
    "the first is of shape {shape}, placed as {placements} on a mesh of {mesh}. Of parameters with two dimensions "
    "or more blocks stay whole where the first is sharded, or the second in parts of a multiple of block_size"
)
PLAIN = {Tensor, torch.nn.Parameter}  # types that are no subclass with ways of its own


class Optimizer8bit(torch.optim.Optimizer):
    """The base of every optimizer here. A subclass gives its arguments, and its rule for a group.

    ``state[p]`` holds, by torch.optim's names, ``step`` (a float32 scalar) and for each state of the rule either
    ``name``, float32 of p's shape, or ``name``, uint8 codes of p's shape, with ``name_absmax``, float32 of shape (rows,
    blocks per row). Signed states are coded by the signed dynamic map, others by the unsigned one; nothing positive
    becomes zero in those.
    """

    _step_supports_amp_scaling = True  # read by torch.amp.GradScaler

    def __init__(self, params: Any, defaults: dict[str, Any], options: Options) -> None:
        unknown = set(options) - set(DEFAULTS)
        if unknown:
            raise TypeError(f"{type(self).__name__} got an unexpected keyword argument {min(unknown)!r}")
        super().__init__(params, {**defaults, **DEFAULTS, **options})
        _leave_to_python()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _leave_to_python()

    @abstractmethod
    def rule(self, group: dict[str, Any]) -> Rule:
        """The update rule of a parameter group."""

    def hyper(self, group: dict[str, Any]) -> dict[str, Any]:
        """The rule's hyper-parameters, ``rule.hyper``, from a parameter group: beta1 is the first of its betas."""
        values = {**group, **{f"beta{i}": beta for i, beta in enumerate(group.get("betas", ()), 1)}}
        chosen = {name: values[name] for name in self.rule(group).hyper}
        return {
            name: value.item() if isinstance(value, Tensor) and not (name == "lr" and is_on_device(value)) else value
            for name, value in chosen.items()
        }

    def initial(self, group: dict[str, Any]) -> dict[str, float]:
        """What states begin as, by name, where it is not zero."""
        return {}

    def check_param(self, param: Tensor) -> None:
        """Raises where the rule cannot take a parameter."""

    @abstractmethod
    def check_group(self, group: dict[str, Any]) -> None:
        """Raises ValueError for hyper-parameters that torch.optim refuses."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group as torch.optim does, after its options and parameters have been checked.

        Raises:
            ValueError: an option has a value it cannot have.
            TypeError: a parameter is of a dtype that cannot be optimized, or a DTensor whose shards cannot be.
        """
        if not isinstance(param_group, dict):
            super().add_param_group(param_group)  # which refuses it
        group = {**self.defaults, **param_group}
        check_options(group)
        self.check_group(group)
        params = param_group["params"]
        if isinstance(params, Tensor):
            params = [params]
        elif not isinstance(params, set):  # which torch.optim refuses
            params = list(params)
        tensors = [param[1] if isinstance(param, tuple) else param for param in params]
        tensors = [param for param in tensors if isinstance(param, Tensor)]  # torch.optim refuses the others
        for param in tensors:
            self._check_param(param, group)
        if group["offload"]:
            others = [of for group in self.param_groups if group["offload"] for of in group["params"]]
            refuse_shared([*others, *tensors])
        param_group["params"] = params
        super().add_param_group(param_group)
        self._backward.watch()
        cut = [param for param in tensors if is_cut(param, group)]
        if cut:
            about = shards.described(cut[0])
            warnings.warn(CUT_BLOCKS.format(count=len(cut), block_size=group["block_size"], **about), stacklevel=2)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient, in one call per device.

        ``torch.amp.GradScaler`` hands its scale and its finding of infinities over (``grad_scale``, ``found_inf``):
        the gradients are unscaled in the same pass, and left as they are; a step with infinities is skipped.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError: a gradient is sparse, or is not of its parameter's shape; or a CUDA graph is captured without
                ``capturable``. Nothing has been updated then.
            ValueError: ``fused=True`` and no compiled kernels can serve a parameter; or a state is not of its
                parameter's shape and dtype, or was made with another block size. Nothing has been updated then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    def _update(self) -> None:
        """Takes a step with the gradients that are there."""
        is_captured = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        if is_captured:
            self._check_capture()
        grad_scale, found_inf = (_tensor(getattr(self, name, None)) for name in ("grad_scale", "found_inf"))
        self._backward.watch()
        done = self._backward.finish(is_scaled=grad_scale is not None or found_inf is not None)
        # Everything is checked before the first state is made, and the first backend writes.
        fresh: dict[Tensor, dict[str, Tensor]] = {}
        asked = [self._asked(i, grad_scale, found_inf, done=done) for i in range(len(self.param_groups))]
        together, one_by_one = _divided(asked)
        for each in one_by_one:
            self._check_divided(each)
        work = [self._work(each, fresh) for each in together]
        if self._share_memory(together):
            self._take([], fresh, is_captured)
            for each in together:  # after what the one before has written
                self._take(self._work(each, fresh), {}, is_captured)
        else:
            self._take([item for of_group in work for item in of_group], fresh, is_captured)
        for each in one_by_one:
            self._step_gathered(each)
        _note_writes([param for each in together for param in each.owners])
        for param in [param for each in asked if each.group["offload"] for param in each.owners]:
            self._hosts.give_back(param)
        if any(group["offload"] for group in self.param_groups):
            self._hosts.keep({param for group in self.param_groups for param in group["params"]})

    def _share_memory(self, together: Sequence[Asked]) -> bool:
        """Whether parameters of several groups may; looked at only where plans have changed."""
        if "_is_shared" not in self.__dict__:
            self._is_shared = len(together) > 1 and bool(overlapping([p for each in together for p in each.params]))
        return self._is_shared

    def _check_divided(self, asked: Asked) -> None:
        """Raises for one parameter what the plan of many raises: before anything is gathered."""
        (param,), (shard,), (grad,), (state,) = asked.owners, asked.params, asked.grads, self._states(asked)
        self._check_param(param, asked.group)
        shards.check_grad(param)
        backend_of(asked, shard, grad)
        if state:
            check(f"parameter {asked.numbers[0]}", shard, asked.rule, asked.group, state)

    def _step_gathered(self, asked: Asked) -> None:
        """Steps a divided parameter by a rule that looks at whole ones: all processes gather it, and step it alike."""
        (param,), group = asked.owners, asked.group
        had = {name: shards.everywhere(value) for name, value in self.state.get(param, {}).items()}
        whole, grad = shards.everywhere(param.detach()), shards.everywhere(param.grad)
        coded = will_be_coded(had, asked.rule, param, group)
        states = initialized(had, asked.rule, whole, group, coded, self.initial(group))
        asked = asked._replace(params=[whole], grads=[grad], owners=[whole], placements=None)
        work = Plan(asked, [states]).work(asked, [states])
        assert work is not None
        self._take(work, {}, False)
        shards.local(param).copy_(shards.part(whole, param))
        self.state[param].clear()
        self.state[param].update(shards.sharded(shards.cut(states, param), param, group["block_size"]))

    def _take(self, work: list[Work], fresh: Mapping[Tensor, Mapping[str, Tensor]], is_captured: bool) -> None:
        """Does the work, after the states that are missing have been added."""
        for param, state in fresh.items():
            self.state[param].clear()
            self.state[param].update(state)
        if is_captured:  # the graph reads what was prepared whenever it is replayed, whatever becomes of the plans
            self.__dict__.setdefault("_of_graphs", []).extend(update.prepared for _, update, _ in work)
        updates: dict[Backend, list[GroupUpdate]] = {}
        for backend, update, _ in work:
            updates.setdefault(backend, []).append(update)
        for backend, batch in updates.items():
            backend.step(batch)
        for param, contiguous in [copy for item in work for copy in item.copies]:
            param.copy_(contiguous)

    def _work(self, asked: Asked, fresh: dict[Tensor, dict[str, Tensor]]) -> list[Work]:
        """The work that is asked for. States that it needs and that are not there yet are added to ``fresh``."""
        group = asked.group
        plans = self.__dict__.setdefault("_plans", {})
        for gone in [place for place in plans if place[0] >= len(self.param_groups)]:
            del plans[gone]
        plan = plans.get(asked.place)
        work = plan.work(asked, self._states(asked)) if plan else None
        if work is None:
            for param in asked.owners:
                self._check_param(param, group)
                if asked.place[1] is None:
                    shards.check_grad(param)
            states = [
                initialized(
                    state, asked.rule, shard, group, will_be_coded(state, asked.rule, param, group), self.initial(group)
                )
                for state, shard, param in zip(self._states(asked), asked.params, asked.owners, strict=True)
            ]
            plan = plans[asked.place] = Plan(asked, states)
            self.__dict__.pop("_is_shared", None)
            work = plan.work(asked, states)
            assert work is not None
            for param, state in zip(asked.owners, states, strict=True):
                fresh[param] = shards.sharded(state, param, group["block_size"])
        return work

    def _asked(
        self,
        index: int,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        *,
        alone: int | None = None,
        done: Set[Tensor] = frozenset(),
    ) -> Asked:
        """What a step is asked to do with a group.

        Args:
            index: of the group.
            alone: of the one parameter in it that is stepped now, if it is not all; its host has what it takes.
            done: parameters that have been stepped already.
        """
        group = self.param_groups[index]
        check_options(group)  # anew, as a user may write into it
        self.check_group(group)
        params = group["params"]
        first = sum(len(earlier["params"]) for earlier in self.param_groups[:index])
        numbers = range(first, first + len(params))
        if alone is not None:
            params, numbers = params[alone : alone + 1], numbers[alone : alone + 1]
        grads = list(map(attrgetter("grad"), params))
        if done or any(map(is_, grads, repeat(None))):
            present = [i for i, grad in enumerate(grads) if grad is not None and params[i] not in done]
            params, grads = [params[i] for i in present], [grads[i] for i in present]
            numbers = [numbers[i] for i in present]
        owners, types, placements = params, frozenset(map(type, grads)), None
        if types - PLAIN:
            placements = tuple(map(shards.placement_of, owners))
        if group["offload"]:
            hosts = self._fetched(owners) if alone is None else [self._hosts.of(param) for param in owners]
            params, grads = [host.param for host in hosts], [host.grad for host in hosts]
        elif placements:
            params, grads = list(map(shards.local, owners)), list(map(shards.local_grad, grads, owners))
        return Asked(
            place=(index, alone),
            rule=self.rule(group),
            group=group,
            wanted_backend=wanted_backend(),
            params=params,
            grads=grads,
            owners=owners,
            types=types,
            placements=placements,
            numbers=numbers,
            hyper=self.hyper(group),
            grad_scale=grad_scale,
            found_inf=found_inf,
        )

    @property
    def _hosts(self) -> Hosts:
        if "_hosts_of_parameters" not in self.__dict__:  # as after unpickling
            self._hosts_of_parameters = Hosts()
        return self._hosts_of_parameters

    @property
    def _backward(self) -> Backward:
        if "_backward_steps" not in self.__dict__:
            me = weakref.proxy(self)
            self._backward_steps = Backward(lambda: me.param_groups, self._hosts, lambda *place: me._prepared(*place))
        return self._backward_steps

    def _fetched(self, params: Sequence[Tensor]) -> list[Host]:
        """Parameters and gradients on the CPU."""
        hosts = [self._hosts.fetched(param) for param in params]
        for host in hosts:
            host.wait()
        return hosts

    def _prepared(self, index: int, alone: int) -> Callable[[], None]:
        """The step of one parameter, which its host has or is about to have, for a thread to take."""
        asked = self._asked(index, alone=alone)
        asked = asked._replace(group=dict(asked.group))  # the thread shall not see what is written into it later

        def step() -> None:
            fresh: dict[Tensor, dict[str, Tensor]] = {}
            self._take(self._work(asked, fresh), fresh, False)

        return step

    def _states(self, asked: Asked) -> list[dict[str, Tensor]]:
        """Those that are there, of the parameters or of their shards."""
        states = [self.state.get(param, {}) for param in asked.owners]
        return states if asked.placements is None else list(map(shards.local_states, states))

    def _check_capture(self) -> None:
        if not all(group["capturable"] for group in self.param_groups):
            raise RuntimeError(
                f"a step of {type(self).__name__} is captured in a CUDA graph: that takes capturable=True"
            )

    def _check_param(self, param: Tensor, group: dict[str, Any]) -> None:
        whole = self.rule(group).whole
        by_chance = group["stochastic_rounding"] and param.dtype == torch.bfloat16 and not whole
        shards.check(param, by_chance=by_chance)
        if group["offload"] and whole and shards.is_divided(param):
            raise TypeError(f"{type(self).__name__} looks at whole parameters: of shards it takes no offload")
        if param.dtype not in SUPPORTED_DTYPES:
            raise TypeError(f"parameters must be one of {', '.join(map(str, SUPPORTED_DTYPES))}, got {param.dtype}")
        for name in ("stochastic_rounding", "compensation"):
            if group[name] and param.dtype == torch.float16:
                raise ValueError(f"{name}=True is for bfloat16 parameters, got one of torch.float16")
        if group["capturable"] and not can_capture(param, self.rule(group)):
            raise ValueError(
                f"capturable must be left out for {type(self).__name__} on {param.device}, where no kernels in Triton "
                "serve it, got True"
            )
        if group["capturable"] and group["offload"]:
            raise ValueError("capturable=True and offload exclude each other: a graph cannot hold a step on the CPU")
        self.check_param(param)

    def state_dict(self) -> dict[str, Any]:
        """As of torch.optim, in tensors of the optimizer's own; see the class for the states."""
        self._backward.wait()
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        self._backward.wait()
        return super().__getstate__()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this optimizer, of its counterpart in torch.optim, or of bitsandbytes.

        Hyper-parameters come from the state dict; the options that say how states are stored and computed (every
        option but ``maximize``) stay as they are. States that are stored otherwise than those say, in blocks of
        another size or with other bits, are converted; those that are stored alike are taken bit for bit, and
        training continues bit for bit. The state dict is left alone, and shares no memory with the optimizer.

        Hyper-parameters that bitsandbytes' groups lack keep their values. Its Adam decays weights as AdamW does, so
        ``Adam8bit`` becomes ``decoupled_weight_decay`` by it. The states of its LARS are refused: they are
        not those of the paper.

        Args:
            state_dict: as :meth:`state_dict` returned it.

        Raises:
            TypeError: ``state_dict`` is not a dict.
            ValueError: a parameter group or a state is not one of this optimizer and its parameters: it is
                missing, unknown, of another shape, dtype or kind, or has a value that it cannot have. The message
                names the parameter. Nothing has been changed then.
        """
        if not isinstance(state_dict, dict):
            raise TypeError(f"a state dict must be a dict, got {type(state_dict).__name__}")

        def check_loaded(group: dict[str, Any]) -> None:
            check_options(group)
            self.check_group(group)

        self._backward.wait()
        with reading(self, Policy(KEPT, check_loaded)):
            super().load_state_dict(state_dict)
        self._backward.drop()
        self.__dict__.pop("_plans", None)  # which hold on to the states there were


def _note_writes(params: list[Tensor]) -> None:
    """Tells autograd, which does not see what kernels write."""
    try:
        increment_version(params)
    except TypeError:  # of older torch, which takes one at a time
        for param in params:
            increment_version(param)


def _divided(asked: Sequence[Asked]) -> tuple[list[Asked], list[Asked]]:
    """What can be stepped as it lies; and one by one the parameters that no process has the whole of, which their rule
    looks at."""
    together, one_by_one = [], []
    for each in asked:
        looks_at_wholes = each.rule.whole and each.placements
        apart = [i for i, param in enumerate(each.owners) if shards.is_divided(param)] if looks_at_wholes else []
        together.append(each.part(sorted({*range(len(each.owners))} - {*apart})) if apart else each)
        one_by_one += [each.part([i]) for i in apart]
    return together, one_by_one


def _leave_to_python() -> None:
    """Keeps torch.compile from tracing a step into its tables of addresses: its graph breaks there, once.

    Done when the first optimizer is made, as it imports half of torch; torch.optim has done so by then.
    """
    if not hasattr(Optimizer8bit._update, "_torchdynamo_disable"):
        Optimizer8bit._update = torch.compiler.disable(Optimizer8bit._update)  # type: ignore


def _tensor(value: Any) -> Tensor | None:
    """What GradScaler hands over, if it does: a tensor, or a number where there was no gradient to look at."""
    if value is None or isinstance(value, Tensor):
        return value if value is None else shards.everywhere(value)
    return torch.tensor(float(value), dtype=torch.float32, device="cpu")
