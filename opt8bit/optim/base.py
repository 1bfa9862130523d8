"""Optimizer8bit: arguments, state, the one step loop and checkpoints of every optimizer."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence, Set
from itertools import chain, islice
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from opt8bit.backends import Rule, can_capture, stored_as, wanted_backend, warn
from opt8bit.optim import shards
from opt8bit.optim.backward import Backward
from opt8bit.optim.checkpoint import reading
from opt8bit.optim.facts import FactsOfGroups, hyper_of
from opt8bit.optim.groups import Policy
from opt8bit.optim.offload import BACKWARD, Host, Hosts
from opt8bit.optim.options import DEFAULTS, KEPT, Options, check_options
from opt8bit.optim.overlap import refuse_shared
from opt8bit.optim.pickled import renew
from opt8bit.optim.plan import Asked, Plan, Work, backend_of
from opt8bit.optim.states import CODED_DTYPES, check, initialized, is_cut, is_flattened, others, will_be_coded
from opt8bit.quant import decode_state

SUPPORTED_DTYPES = (*CODED_DTYPES, torch.float64, torch.complex64, torch.complex128)

CUT_BLOCKS = (
    "the states of {count} parameters are kept in 32 bits, as shards cut blocks of block_size={block_size} elements; "
    "the first is of shape {shape}, placed as {placements} on a mesh of {mesh}. Of parameters with two dimensions "
    "or more blocks stay whole where the first is sharded, or the second in parts of a multiple of block_size"
)
FLATTENED = (
    "the states of {count} parameters are kept in 32 bits, as FSDP1 (FullyShardedDataParallel) flattens parameters and "
    "cuts them anywhere; fully_shard, which is FSDP2, keeps 8 bits"
)
PLAIN = {Tensor, torch.nn.Parameter}  # types that are no subclass with ways of its own

Place = tuple[int, "int | None"] | None  # a group's number, and that of one parameter in it; None for all groups
Scaling = tuple["Tensor | None", "Tensor | None"]  # what GradScaler hands over: grad_scale and found_inf


class Optimizer8bit(torch.optim.Optimizer):
    """The base of every optimizer here. A subclass gives its arguments, and its rule for a group.

    ``state[p]`` holds ``step``, a float32 scalar, and each state of the rule. In 32 bits a state is ``name``, by
    torch.optim's name, float32 of p's shape. In 8 bits it is ``name_codes``, uint8 of p's shape, and ``name_scale``,
    float32 of shape (rows, blocks per row): see :func:`opt8bit.quant.encode_state`. :meth:`dequantized_state` returns
    either as floats. What others keep in ``state[p]`` is left alone.
    """

    def __init__(self, params: Any, defaults: dict[str, Any], options: Options) -> None:
        unknown = set(options) - set(DEFAULTS)
        if unknown:
            raise TypeError(f"{type(self).__name__} got an unexpected keyword argument {min(unknown)!r}")
        super().__init__(params, {**defaults, **DEFAULTS, **options})
        _leave_to_python()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        renew(self)
        _leave_to_python()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether ``torch.amp.GradScaler`` leaves the unscaling to :meth:`step`: if every group says ``fused=True``.

        As in torch.optim. What asks for gradients that are unscaled before the step, as Lightning's clipping does,
        takes optimizers only that do not. With ``offload="backward"``, too, as the step then refuses the scaler, which
        comes too late.
        """
        is_too_late = any(group["offload"] == BACKWARD for group in self.param_groups)
        return is_too_late or all(group["fused"] is True for group in self.param_groups)

    @abstractmethod
    def rule(self, group: dict[str, Any]) -> Rule:
        """The update rule of a parameter group."""

    def hyper(self, group: dict[str, Any]) -> dict[str, Any]:
        """Returns the rule's hyper-parameters, ``rule.hyper``, from a parameter group."""
        return hyper_of(self.rule(group), group)

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
            if param.requires_grad:
                self._check_param(param, group)
            else:  # may be of any kind, but where torch.optim, too, looks at its shape
                self.check_param(param)
        if group["offload"]:
            others = [of for group in self.param_groups if group["offload"] for of in group["params"]]
            refuse_shared([*others, *tensors])
        param_group["params"] = params
        super().add_param_group(param_group)
        self._backward.watch()
        _warn_of_full_states([param for param in tensors if param.requires_grad], group)

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
        scaling = _tensor(getattr(self, "grad_scale", None)), _tensor(getattr(self, "found_inf", None))
        self._backward.watch()
        done = self._backward.finish(is_scaled=any(value is not None for value in scaling))
        # Everything is checked before the first state is made, and the first backend writes.
        fresh: dict[Tensor, dict[str, Any]] = {}
        together, one_by_one = _divided(self._all_asked(done))
        for each in one_by_one:
            self._check_divided(each)
        work = self._work(None, together, fresh, scaling)
        if self._plans[None].is_shared:
            self._take([], fresh, is_captured)
            for index, each in enumerate(together):  # after what the one before has written
                self._take(self._work((index, None), [each], fresh, scaling), {}, is_captured)
        else:
            self._take(work, fresh, is_captured)
        for each in one_by_one:
            self._step_gathered(each, scaling)
        _note_writes([param for each in together for param in each.owners])
        offloaded = [group for group in self.param_groups if group["offload"]]
        if offloaded:
            for param in [param for each in together if each.group["offload"] for param in each.owners]:
                self._hosts.give_back(param)
            self._hosts.keep({param for group in self.param_groups for param in group["params"]})

    def _check_divided(self, asked: Asked) -> None:
        """Raises for one parameter what the plan of many raises: before anything is gathered."""
        (param,), (shard,), (grad,), (state,) = asked.owners, asked.params, asked.grads, self._states([asked])
        self._check_asked(asked, 0)
        backend_of(asked, shard, grad)
        if state:
            coded = will_be_coded(state, asked.rule, param, asked.group)
            check(asked.where(0), shard, asked.rule, asked.group, self._initialized(asked, 0, shard, state, coded))

    def _step_gathered(self, asked: Asked, scaling: Scaling) -> None:
        """Steps a divided parameter by a rule that looks at whole ones: all processes gather it, and step it alike."""
        (param,), group = asked.owners, asked.group
        state = self.state.get(param, {})
        had = {name: shards.everywhere(value) for name, value in state.items()}
        whole, grad = shards.everywhere(param.detach()), shards.everywhere(param.grad)
        states = self._initialized(asked, 0, whole, had, will_be_coded(had, asked.rule, param, group))
        asked = asked._replace(params=[whole], grads=[grad], owners=[whole], placements=None)
        work = Plan([asked], [states]).work([asked], [states], *scaling)
        assert work is not None
        self._take(work, {}, False)
        shards.local(param).copy_(shards.part(whole, param))
        stored = shards.sharded(shards.cut(states, param), param, group["block_size"])
        self._keep(param, {**others(state, asked.rule, states), **stored})

    def _take(self, work: list[Work], fresh: Mapping[Tensor, Mapping[str, Any]], is_captured: bool) -> None:
        """Does the work, after the states that are missing have been added."""
        for param, state in fresh.items():
            self._keep(param, state)
        if is_captured:  # the graph reads what was prepared whenever it is replayed, whatever becomes of the plans
            self.__dict__.setdefault("_of_graphs", []).extend(item.step.prepared for item in work)
        for backend, step, _ in work:
            backend.step(step)
        for param, contiguous in [copy for item in work for copy in item.copies]:
            param.copy_(contiguous)

    def _keep(self, param: Tensor, state: Mapping[str, Any]) -> None:
        self.state[param].clear()
        self.state[param].update(state)

    def _work(
        self, place: Place, asked: Sequence[Asked], fresh: dict[Tensor, dict[str, Any]], scaling: Scaling
    ) -> list[Work]:
        """Returns the work that is asked for. States that it needs and that are not there yet are added to ``fresh``.

        Args:
            place: whose plan it is.
        """
        plans = self._plans
        for gone in [each for each in plans if each and each[0] >= len(self.param_groups)]:
            del plans[gone]
        states = self._states(asked)
        work = plans[place].work(asked, states, *scaling) if place in plans else None
        if work is not None:
            return work
        made: list[dict[str, Tensor]] = []
        for each in asked:
            for i, (shard, param) in enumerate(zip(each.params, each.owners, strict=True)):
                self._check_asked(each, i, is_alone=place is not None and place[1] is not None)
                state = states[len(made)]
                coded = will_be_coded(state, each.rule, param, each.group)
                made.append(self._initialized(each, i, shard, state, coded))
        owners = [(each, param) for each in asked for param in each.owners]
        # As they will lie in the optimizer, with what others keep there.
        kept = [
            {**others(state, each.rule, mine), **mine}
            for (each, _), state, mine in zip(owners, states, made, strict=True)
        ]
        plan = plans[place] = Plan(asked, kept)
        work = plan.work(asked, kept, *scaling)
        assert work is not None
        for (each, param), mine in zip(owners, made, strict=True):
            stored = shards.sharded(mine, param, each.group["block_size"])
            fresh[param] = {**others(self.state.get(param, {}), each.rule, mine), **stored}
        return work

    def _initialized(
        self, asked: Asked, i: int, shard: Tensor, state: Mapping[str, Any], coded: bool
    ) -> dict[str, Tensor]:
        return initialized(asked.where(i), state, asked.rule, shard, asked.group, coded, self.initial(asked.group))

    def _check_asked(self, asked: Asked, i: int, *, is_alone: bool = False) -> None:
        """Raises for a parameter that cannot be stepped, or not with its gradient; by its name."""
        try:
            self._check_param(asked.owners[i], asked.group)
            if not is_alone:  # whose gradient has been fetched, and may be gone
                shards.check_grad(asked.owners[i])
        except (RuntimeError, TypeError, ValueError) as error:
            raise type(error)(f"{asked.where(i)}: {error}") from None

    def _all_asked(self, done: Set[Tensor]) -> list[Asked]:
        """Returns what a step is asked to do with each group, but with the parameters that are done already."""
        wanted, first, result = wanted_backend(), 0, []
        for index, group in enumerate(self.param_groups):
            result.append(self._asked(index, first, wanted, done=done))
            first += len(group["params"])
        return result

    def _asked(
        self,
        index: int,
        first: int,
        wanted: str | None,
        *,
        alone: int | None = None,
        done: Set[Tensor] = frozenset(),
    ) -> Asked:
        """Returns what a step is asked to do with a group.

        Args:
            index: of the group.
            first: number of its first parameter in the optimizer.
            wanted: the backend that the environment names.
            alone: of the one parameter in it that is stepped now, if it is not all; its host has what it takes.
            done: parameters that have been stepped already.
        """
        group = self.param_groups[index]
        facts = self._facts.of(index, group)
        params = group["params"]
        numbers: Sequence[int] = range(first, first + len(params))
        if alone is not None:
            params, numbers = params[alone : alone + 1], numbers[alone : alone + 1]
        grads = list(map(attrgetter("grad"), params))
        types = frozenset(map(type, grads))
        if done or type(None) in types:
            present = [i for i, grad in enumerate(grads) if grad is not None and params[i] not in done]
            params, grads = [params[i] for i in present], [grads[i] for i in present]
            numbers, types = [numbers[i] for i in present], frozenset(map(type, grads))
        owners, placements = params, None
        if types - PLAIN:
            placements = tuple(map(shards.placement_of, owners))
        if group["offload"]:
            hosts = self._fetched(owners) if alone is None else [self._hosts.of(param) for param in owners]
            params, grads = [host.param for host in hosts], [host.grad for host in hosts]
        elif placements:
            params, grads = list(map(shards.local, owners)), list(map(shards.local_grad, grads, owners))
        return Asked(
            rule=facts.rule,
            group=group,
            options=facts.planned,
            wanted_backend=wanted,
            params=params,
            grads=grads,
            owners=owners,
            types=types,
            placements=placements,
            first=first,
            numbers=numbers,
            hyper=facts.hyper,
        )

    @property
    def _plans(self) -> dict[Place, Plan]:
        return self.__dict__.setdefault("_plans_by_place", {})  # as after unpickling

    @property
    def _facts(self) -> FactsOfGroups:
        if "_facts_of_groups" not in self.__dict__:
            me = weakref.proxy(self)
            self._facts_of_groups = FactsOfGroups(
                self.defaults, lambda group: me.rule(group), lambda group: me.check_group(group)
            )
        return self._facts_of_groups

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
        first = sum(len(group["params"]) for group in self.param_groups[:index])
        asked = self._asked(index, first, wanted_backend(), alone=alone)
        asked = asked._replace(group=dict(asked.group))  # the thread shall not see what is written into it later

        def step() -> None:
            fresh: dict[Tensor, dict[str, Any]] = {}
            self._take(self._work((index, alone), [asked], fresh, (None, None)), fresh, False)

        return step

    def _states(self, asked: Sequence[Asked]) -> list[dict[str, Any]]:
        """Returns those that are there, of the parameters or of their shards."""
        owners = list(chain.from_iterable(each.owners for each in asked))
        # Where they lie in the order of the parameters, as is usual, none has to be looked up.
        if len(owners) == len(self.state) and all(map(is_, owners, self.state)):
            states = list(self.state.values())
        else:
            states = [self.state.get(param, {}) for param in owners]
        if all(each.placements is None for each in asked):
            return states
        remaining, result = iter(states), []
        for each in asked:
            mine = islice(remaining, len(each.owners))
            result += mine if each.placements is None else map(shards.local_states, mine)
        return result

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

    @torch.no_grad()
    def dequantized_state(self, param: Tensor) -> dict[str, Tensor]:
        """Returns the states of a parameter as floats, by torch.optim's names: what a step starts from.

        Args:
            param: one of the optimizer's.

        Returns:
            New tensors: each state in full, on the device that it lies on, a DTensor if the parameter is one; and
            ``step``. Empty where the parameter has no states yet.

        Raises:
            KeyError: the optimizer does not have the parameter.
        """
        groups = [group for group in self.param_groups if any(param is each for each in group["params"])]
        if not groups:
            raise KeyError("the optimizer does not have this parameter")
        self._backward.wait()
        (group,), state = groups, shards.local_states(self.state.get(param, {}))
        result = {}
        for name, signed in self.rule(group).states.items():
            codes, scale = stored_as(name)
            if name in state:
                result[name] = state[name].clone()
            elif codes in state:
                result[name] = decode_state(state[codes], state[scale], signed, group["block_size"])
        if "step" in state:
            result["step"] = state["step"].clone()
        return shards.sharded(result, param, group["block_size"])

    def state_dict(self) -> dict[str, Any]:
        """Returns what torch.optim does, in tensors of the optimizer's own; see the class for the states.

        It is for optimizers of this package. torch.optim's do not all refuse it: AdamW fails at its first step, but
        SGD and Muon begin their momentum anew without a word. For them there is
        :func:`opt8bit.optim.to_torch_state_dict`.
        """
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
        self._plans.clear()  # which hold on to the states there were


def _warn_of_full_states(params: Sequence[Tensor], group: Mapping[str, Any]) -> None:
    """Tells of parameters whose states would have been in 8 bits on one process."""
    cut = [param for param in params if is_cut(param, group)]
    if cut:
        about = shards.described(cut[0])
        warn(CUT_BLOCKS.format(count=len(cut), block_size=group["block_size"], **about))
    flattened = [param for param in params if is_flattened(param, group)]
    if flattened:
        warn(FLATTENED.format(count=len(flattened)))


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
