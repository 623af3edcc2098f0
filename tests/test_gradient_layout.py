"""The pass that decides where gradients lie, in a group of one real process (gloo)."""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_training_precision import build, make_batch
from tiny_training import differs
from torch.nn.parallel import DistributedDataParallel

from espnet2_spear.train.checkpoint import _memory
from espnet2_spear.train.gradients import fix_gradient_layout


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_changes_nothing_and_gradients_come_as_in_training(group: None) -> None:
    # As ESPnet has it, but with several buckets.
    model = DistributedDataParallel(
        build(True), bucket_cap_mb=0.05, gradient_as_bucket_view=True
    )
    names = {p: n for n, p in model.module.named_parameters() if p.requires_grad}
    came: list[str] = []
    for parameter, name in names.items():
        parameter.register_post_accumulate_grad_hook(
            lambda _, name=name: came.append(name)
        )
    before = copy.deepcopy(model.module.state_dict()), _memory(model.module)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    fix_gradient_layout(model, torch.device("cpu"), contextlib.nullcontext)
    assert torch.equal(torch.rand(4), expected)  # no random number was drawn
    after = model.module.state_dict(), _memory(model.module)
    assert differs(before, after) == ""
    assert all(p.grad is None for p in names)
    first = list(came)
    assert sorted(first) == sorted(names.values())
    layouts = []
    for step in (0, 1):
        came.clear()
        model.train()
        model(**make_batch(step))[0].sum().backward()
        assert came == first
        layouts.append([p.grad.storage_offset() for p in names])
        assert len({p.grad.untyped_storage().data_ptr() for p in names}) > 3
        model.zero_grad()
    # From the first step on where they stay.
    assert layouts[0] == layouts[1]
