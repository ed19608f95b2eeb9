"""Logs of slates: what was shown to whom, and what was clicked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from probkit.data import as_tensor
from probkit.errors import DataError, ShapeError
from probkit.files import storable
from probkit.loader import Loader
from probkit.model import Batch
from probkit.models.slates import checks
from probkit.models.slates.ids import FIRST_ITEM, PAD, UNK

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["SlateLog"]

Part = Literal["train", "valid", "test"]
_PARTS = ("train", "valid", "test")
_STEPWISE = ("slate", "click", "click_idx", "slate_lengths", "interaction_type")


@storable
@dataclass(frozen=True, eq=False)
class SlateLog:
    """Slates shown to U users over T steps, and the click on each.

    Ids: 0 is padding, 1 "no click", 2 an unknown item, real items begin at 3. Slot 0 of every
    slate holds 1, so that not clicking is one of the choices; unused slots at the end hold 0. Steps
    after a user's last one hold click 0.

    A user belongs to the training, validation or test part. Steps with ``train`` false are held
    out: of validation and test users they are what :meth:`mask` returns for that part.

    Args:
        slate: Ids shown [user, step, slot].
        click: Id clicked [user, step]: 1 for none, 0 for a step after the last.
        click_idx: Slot of the click [user, step]; None finds it.
        slate_lengths: Slots in use [user, step], slot 0 included; None counts them.
        interaction_type: [user, step] 0 unknown, 1 search, 2 recommendation; None for all 2.
        groups: Group of each id [item], the three special ones included; None for one group.
        train: Steps used for training [user, step]; None for all.
        part: Part of each user [user]: 0 train, 1 valid, 2 test; None for all 0.
        n_items: Number of ids I, the special ones included; None takes the largest id (or the
            length of ``groups``).
        propensity: Probability with which the logging policy filled each slot [user, step, slot];
            None where it is not known.
        extra: Further tensors [user, ...] that travel with the users.
        labels: Labels along the dims "user", "item" and "group", for export.
        check: Whether to check every slate. Blocks of users are read in turn, so a log that is
            mapped from disk need not fit in memory.

    Raises:
        DataError: Ids, slots, lengths, groups or propensities contradict one another.
        ShapeError: Shapes do not fit together.

    Example:
        >>> log = SlateLog([[[1, 3, 4], [1, 4, 5]]], [[4, 1]])
        >>> len(log), log.n_items, log.click_idx.tolist()
        (1, 6, [[2, 0]])
    """

    slate: Any
    click: Any
    click_idx: Any = None
    slate_lengths: Any = None
    interaction_type: Any = None
    groups: Any = None
    train: Any = None
    part: Any = None
    n_items: Any = None
    propensity: Any = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    check: bool = True

    def __post_init__(self) -> None:
        slate, click = checks.ids(self.slate, "slate"), checks.ids(self.click, "click")
        if slate.ndim != 3 or 0 in slate.shape:
            raise ShapeError(
                "SlateLog: expected slate [user, step, slot], each dim at least 1, got "
                f"{tuple(slate.shape)}"
            )
        self._set("slate", slate)
        self._set("click", self._stepwise(click, "click"))
        groups = None if self.groups is None else checks.groups(self.groups)
        self._set("n_items", self._number_of_ids(groups))
        if groups is None:
            groups = torch.zeros(self.n_items, dtype=torch.int64, device=slate.device)
        self._set("groups", groups.to(slate.device))
        for name, fill in (
            ("click_idx", checks.find_clicks),
            ("slate_lengths", checks.count_slots),
            ("interaction_type", checks.all_recommended),
        ):
            given = getattr(self, name)
            value = fill(slate, self.click) if given is None else checks.ids(given, name)
            self._set(name, self._stepwise(value, name))
        self._set("train", self._mask_given())
        self._set("part", self._parts_given())
        self._set("extra", {name: as_tensor(v, name=name) for name, v in self.extra.items()})
        for name, value in self.extra.items():
            if value.ndim == 0 or len(value) != self.users:
                raise ShapeError(
                    f"SlateLog: expected extra[{name!r}] [user={self.users}, ...], got "
                    f"{tuple(value.shape)}"
                )
        if self.propensity is not None:
            self._set("propensity", self._propensities_given())
        if self.check:
            checks.check_log(self)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _stepwise(self, value: Tensor, name: str) -> Tensor:
        """See that a tensor is [user, step], on the slate's device."""
        expected = tuple(self.slate.shape[:2])
        if tuple(value.shape) != expected:
            raise ShapeError(
                f"SlateLog: expected {name} [user={expected[0]}, step={expected[1]}] as in slate, "
                f"got {tuple(value.shape)}"
            )
        return value.to(self.slate.device)

    def _number_of_ids(self, groups: Tensor | None) -> int:
        if self.n_items is not None:
            if isinstance(self.n_items, bool) or int(self.n_items) <= FIRST_ITEM:
                raise DataError(
                    f"SlateLog: expected n_items >= {FIRST_ITEM + 1} (ids 0, 1, 2 are padding, no "
                    f"click and unknown), got {self.n_items}"
                )
            if groups is not None and len(groups) != int(self.n_items):
                raise ShapeError(
                    f"SlateLog: expected groups [item={self.n_items}], one for each id (0, 1, 2 "
                    f"included), got {tuple(groups.shape)}"
                )
            return int(self.n_items)
        if groups is not None:
            return len(groups)
        return max(int(self.slate.max()) + 1, FIRST_ITEM + 1)

    def _mask_given(self) -> Tensor:
        if self.train is None:
            return torch.ones(self.slate.shape[:2], dtype=torch.bool, device=self.slate.device)
        mask = as_tensor(self.train, name="train")
        if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
            raise DataError(
                "SlateLog: expected train true or false for each step, got "
                f"values from {mask.min():g} to {mask.max():g}"
            )
        return self._stepwise(mask.bool(), "train")

    def _parts_given(self) -> Tensor:
        if self.part is None:
            return torch.zeros(self.users, dtype=torch.int64, device=self.slate.device)
        part = checks.ids(self.part, "part").long().to(self.slate.device)
        if tuple(part.shape) != (self.users,):
            raise ShapeError(
                f"SlateLog: expected part [user={self.users}], got {tuple(part.shape)}"
            )
        if bool(((part < 0) | (part > 2)).any()):
            raise DataError(
                "SlateLog: expected part 0 (train), 1 (valid) or 2 (test) for each user"
            )
        return part

    def _propensities_given(self) -> Tensor:
        value = as_tensor(self.propensity, name="propensity").to(self.slate.device)
        if tuple(value.shape) != tuple(self.slate.shape):
            raise ShapeError(
                f"SlateLog: expected propensity [user, step, slot] = {tuple(self.slate.shape)} as "
                f"in slate, got {tuple(value.shape)}"
            )
        return value if value.is_floating_point() else value.double()

    # ---------------------------------------------------------------- sizes

    def __len__(self) -> int:
        """Number of users."""
        return int(self.slate.shape[0])

    @property
    def users(self) -> int:
        """Number of users U."""
        return int(self.slate.shape[0])

    @property
    def steps(self) -> int:
        """Number of steps T."""
        return int(self.slate.shape[1])

    @property
    def slots(self) -> int:
        """Number of slots S, slot 0 included."""
        return int(self.slate.shape[2])

    @property
    def n_groups(self) -> int:
        """Number of groups G, the largest group number and those below it."""
        return int(self.groups.max()) + 1

    @property
    def device(self) -> torch.device:
        """Where the log is."""
        return self.slate.device

    @property
    def coords(self) -> Mapping[str, Sequence[Any]]:
        """Labels of users, items and groups, where they are known."""
        return self.labels

    def __repr__(self) -> str:
        """Say the sizes."""
        return (
            f"SlateLog(users={self.users}, steps={self.steps}, slots={self.slots}, "
            f"n_items={self.n_items}, groups={self.n_groups})"
        )

    # ---------------------------------------------------------------- which steps count

    @property
    def observed(self) -> Tensor:
        """Steps [user, step] with a known answer, neither padding nor a click on an unknown."""
        return (self.click != PAD) & (self.click != UNK)

    def mask(self, part: Part = "train") -> Tensor:
        """Return the steps [user, step] that count for a part of the data.

        Args:
            part: "train", or the held-out steps of the users of "valid" or "test".
        """
        if part not in _PARTS:
            raise DataError(f"mask: expected part 'train', 'valid' or 'test', got {part!r}")
        if part == "train":
            return self.observed & self.train
        mine = self.part == _PARTS.index(part)
        return self.observed & ~self.train & mine[:, None]

    def exposure(self, part: Part = "train") -> Tensor:
        """Return how often each id was shown [item] in the steps of ``part``."""
        return self._count(self.slate[self.mask(part)])

    def clicks(self, part: Part = "train") -> Tensor:
        """Return how often each id was clicked [item] in the steps of ``part``."""
        return self._count(self.click[self.mask(part)])

    def _count(self, ids: Tensor) -> Tensor:
        counts = torch.bincount(ids.long().flatten(), minlength=self.n_items)
        counts[PAD] = 0
        return counts

    # ---------------------------------------------------------------- selections

    def take(self, index: Any) -> SlateLog:
        """Return the users ``index`` [user], in that order; ids become int64.

        Groups, labels of items and everything else that users share stay whole.
        """
        index = as_tensor(index, name="index").to(self.device)
        index = index.nonzero()[:, 0] if index.dtype == torch.bool else index.long()
        return self._select(index)

    def _select(self, index: Tensor | slice) -> SlateLog:
        labels = dict(self.labels)
        if "user" in labels:
            numbers = range(*index.indices(self.users)) if isinstance(index, slice) else index
            labels["user"] = [labels["user"][int(u)] for u in numbers]
        part = {name: getattr(self, name)[index].long() for name in _STEPWISE}
        return replace(
            self,
            **part,
            train=self.train[index],
            part=self.part[index],
            propensity=None if self.propensity is None else self.propensity[index],
            extra={name: value[index] for name, value in self.extra.items()},
            labels=labels,
            check=False,
        )

    def __getitem__(self, index: Any) -> SlateLog:
        """Select users: a number, a slice, a mask or a list of numbers."""
        if isinstance(index, slice):
            return self._select(index)
        if isinstance(index, int):
            if not -self.users <= index < self.users:
                raise IndexError(f"user {index} of {self.users}")
            return self.take(torch.tensor([index % self.users]))
        return self.take(index)

    def before(self, step: int) -> SlateLog:
        """Return the first ``step`` steps of every user."""
        if not 1 <= step <= self.steps:
            raise DataError(f"before: expected a step from 1 to {self.steps}, got {step}")
        cut = {name: getattr(self, name)[:, :step] for name in (*_STEPWISE, "train")}
        propensity = None if self.propensity is None else self.propensity[:, :step]
        return replace(self, **cut, propensity=propensity, check=False)

    def hold_out(
        self, *, valid: float = 0.05, test: float = 0.05, keep: int = 5, order: Any = None
    ) -> SlateLog:
        """Hold out the later steps of some users.

        Args:
            valid: Share of users whose steps from ``keep`` on are for validation.
            test: Share of users whose steps from ``keep`` on are for the test.
            keep: First steps of these users that stay in training.
            order: Permutation of the users [user]: validation users first, then test users. None
                takes the permutation that ``torch.manual_seed(0); torch.randperm(users)`` gives,
                as in the official split of the FINN.no data.
        """
        if not (0 <= valid < 1 and 0 <= test < 1 and valid + test <= 1 and keep >= 0):
            raise DataError(
                "hold_out: expected shares valid and test in [0, 1) that sum to at most 1 and "
                f"keep >= 0, got {valid}, {test}, {keep}"
            )
        if order is None:
            order = torch.randperm(self.users, generator=torch.Generator().manual_seed(0))
        order = as_tensor(order, name="order").long()
        if not torch.equal(order.sort().values, torch.arange(self.users)):
            raise DataError(f"hold_out: expected order to be a permutation of {self.users} users")
        first, second = int(valid * self.users), int(test * self.users)
        part = torch.zeros(self.users, dtype=torch.int64)
        part[order[:first]] = 1
        part[order[first : first + second]] = 2
        late = torch.arange(self.steps) >= keep
        train = ~((part > 0)[:, None] & late)
        return replace(self, train=train, part=part, check=False)

    def joined(self, other: SlateLog) -> SlateLog:
        """Append the users of ``other``, a log over the same ids."""
        if other.n_items != self.n_items or not torch.equal(other.groups, self.groups):
            raise DataError(
                f"joined: expected a log over the same {self.n_items} ids and groups, got "
                f"{other.n_items} ids"
            )
        steps, slots = max(self.steps, other.steps), max(self.slots, other.slots)
        parts = [one._widened(steps, slots) for one in (self, other)]
        both: dict[str, Any] = {
            name: torch.cat([p[name] for p in parts])
            for name in parts[0]
            if parts[0][name] is not None and parts[1][name] is not None
        }
        extra = {
            name: torch.cat([self.extra[name], other.extra[name]])
            for name in self.extra
            if name in other.extra
        }
        labels = {name: value for name, value in self.labels.items() if name != "user"}
        if "user" in self.labels and "user" in other.labels:
            labels["user"] = [*self.labels["user"], *other.labels["user"]]
        propensity = both.pop("propensity", None)
        return replace(self, **both, propensity=propensity, extra=extra, labels=labels, check=False)

    def _widened(self, steps: int, slots: int) -> dict[str, Any]:
        """Tensors of the log with padding up to the numbers of steps and slots."""
        late, wide = steps - self.steps, slots - self.slots
        pad = torch.nn.functional.pad
        found: dict[str, Any] = {
            name: pad(getattr(self, name).long(), (0, late)) for name in _STEPWISE[1:]
        }
        found["slate"] = pad(self.slate.long(), (0, wide, 0, late))
        found["train"] = pad(self.train, (0, late))
        found["part"] = self.part
        found["propensity"] = (
            None if self.propensity is None else pad(self.propensity, (0, wide, 0, late), value=1.0)
        )
        return found

    # ---------------------------------------------------------------- batches

    def loader(self, batch_size: int, *, block: int = 1) -> Loader:
        """Return the users batch by batch, in a new random order in each pass.

        Args:
            batch_size: Users in a batch.
            block: Neighbouring users that stay together. On a log mapped from disk, blocks of some
                hundred users turn random reads into few long ones.

        Example:
            >>> log = SlateLog([[[1, 3, 4]]] * 6, [[3]] * 6)
            >>> log.loader(4).units
            6
        """
        if batch_size < 1 or block < 1 or batch_size % block:
            raise DataError(
                "loader: expected batch_size >= 1, a multiple of block >= 1, got "
                f"batch_size={batch_size}, block={block}"
            )

        def factory(epoch: int, generator: torch.Generator) -> Iterator[Batch]:
            blocks = -(-self.users // block)
            order = torch.randperm(blocks, generator=generator, device=generator.device).cpu()
            for chosen in order.split(batch_size // block):
                index = (chosen[:, None] * block + torch.arange(block)).flatten()
                index = index[index < self.users]
                yield Batch(self.take(index), index, scale=self.users / len(index))

        return Loader(factory, units=self.users, example=self[: min(batch_size, self.users)])

    # ---------------------------------------------------------------- sources

    @classmethod
    def from_finn(
        cls,
        folder: str | Path,
        *,
        cache: str | Path | None = None,
        check: bool = True,
        split: bool = True,
    ) -> SlateLog:
        """Read the FINN.no slate data: ``data.npz``, ``itemattr.npz`` and ``ind2val.json``.

        Arrays that lie uncompressed in ``data.npz`` are mapped, not read. Compressed ones are read
        into memory, or, with ``cache``, unpacked once as ``.npy`` files and mapped from there.
        See :func:`probkit.models.slates.finn.stream_finn` for batches without either.

        Args:
            folder: The folder.
            cache: Folder for the unpacked arrays.
            check: Whether to check every slate.
            split: Whether to hold out the steps of the official split, see :meth:`hold_out`.

        Raises:
            DataError: Files or arrays are missing, pickled, or contradict one another.
        """
        from probkit.models.slates.finn import read_finn

        log = read_finn(Path(folder), cache=None if cache is None else Path(cache), check=check)
        return log.hold_out() if split else log

    @classmethod
    def from_frame(
        cls,
        frame: pd.DataFrame | str | Path,
        *,
        user: str = "user",
        time: str = "time",
        item: str = "item",
        click: str = "click",
        position: str | None = None,
        kind: str | None = None,
        propensity: str | None = None,
        groups: Mapping[Any, Any] | pd.Series | None = None,
        items: Sequence[Any] | None = None,
        min_count: int = 1,
        max_steps: int | None = None,
    ) -> SlateLog:
        """Read a table (or a Parquet file) with one row for each item shown.

        Rows with the same user and time are one slate; see
        :func:`probkit.models.slates.frames.read_frame` for the arguments.
        """
        from probkit.models.slates.frames import read_frame

        return read_frame(
            frame,
            user=user,
            time=time,
            item=item,
            click=click,
            position=position,
            kind=kind,
            propensity=propensity,
            groups=groups,
            items=items,
            min_count=min_count,
            max_steps=max_steps,
        )

    @classmethod
    def from_open_bandit(
        cls,
        folder: str | Path,
        *,
        policy: str = "random",
        campaign: str = "all",
        group_by: str | None = None,
    ) -> SlateLog:
        """Read Open Bandit data: each impression is a slate of its item and no click.

        The data has no user ids, so that each impression is a user of one step; ``extra`` holds
        its "position" (0, 1, 2). See :mod:`probkit.models.slates.open_bandit`.

        Args:
            folder: Folder with ``<policy>_<campaign>.csv`` or ``.csv.gz`` and
                ``item_context_<campaign>.csv``.
            policy: Logging policy, "random" or "bts".
            campaign: "all", "men" or "women".
            group_by: Column of the item context whose values become the groups.
        """
        from probkit.models.slates.open_bandit import read_open_bandit

        return read_open_bandit(Path(folder), policy, campaign, group_by=group_by)
