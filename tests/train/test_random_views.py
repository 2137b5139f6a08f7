"""Random views: a function of map, seed and step, kept on disk for whoever asks again."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from posemap_fast.render import render_views
from posemap_fast.train import RVSConfig, ViewSampler, random_views
from posemap_fast.train.random_views import RandomViewSource, ViewBank
from posemap_fast.train.view_cache import to_uint8

SIZE = (9, 12)
CODES = torch.tensor([[3.0, 0, 0], [0, 3.0, 0], [0, 0, 3.0]])


@pytest.fixture
def source(tiny_map, poses, camera):
    """Makes sources of two views per step on the tiny map."""
    nerfp, renderer = tiny_map
    nerfp.requires_grad_(False)
    free = copy.deepcopy(renderer)
    free.occupancy.bitfield.zero_()  # so that views leave the training poses

    def make(
        seed: int = 0,
        bank: ViewBank | None = None,
        appearance: str = "source",
        codes=CODES,
        n_views: int = 2,
        **rvs: float,
    ):
        return RandomViewSource(
            nerfp,
            renderer,
            ViewSampler(RVSConfig(max_translation=0.1, **rvs), poses, free),
            camera,
            codes,
            image_size=SIZE,
            n_views=n_views,
            appearance=appearance,
            seed=seed,
            bank=bank,
        )

    return make


@pytest.fixture
def renders(monkeypatch) -> list[torch.Tensor]:
    """Poses of every call of render_views."""
    seen: list[torch.Tensor] = []

    def counted(renderer, nerfp, c2w, *arguments, **options):
        seen.append(c2w)
        return render_views(renderer, nerfp, c2w, *arguments, **options)

    monkeypatch.setattr(random_views, "render_views", counted)
    return seen


def bank(folder: Path, n_steps: int = 4, n_views: int = 2) -> ViewBank:
    return ViewBank(folder, n_steps, n_views, SIZE)


def same(ours: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_views_are_pictures_of_the_map_at_their_poses(source, tiny_map, camera) -> None:
    drawn, images = source(codes=None).draw(0)
    assert drawn.shape == (2, 4, 4) and images.shape == (2, *SIZE, 3) and images.dtype == torch.uint8
    view = render_views(tiny_map[1], tiny_map[0], drawn, camera, image_size=SIZE)
    assert torch.equal(images, to_uint8(view.rgb)) and int(images.max()) > int(images.min())


def test_a_step_of_a_seed_has_the_same_views_whoever_asks_and_whenever(source) -> None:
    first = source()
    in_order = [first.draw(k) for k in range(3)]
    other = source()
    torch.manual_seed(9)
    for k in (2, 0, 2, 1):
        assert same(other.draw(k), in_order[k])
    assert not torch.equal(in_order[0][0], in_order[1][0])


def test_coarser_views_take_longer_steps_through_the_same_map(source) -> None:
    fine, coarse = source(), source(coarseness=2.0)
    ours, theirs = fine.renderer.march_spec, coarse.renderer.march_spec
    assert theirs.step_min == pytest.approx(2 * ours.step_min)
    assert coarse.renderer.occupancy is fine.renderer.occupancy
    (poses, images), (others, blurred) = fine.draw(0), coarse.draw(0)
    assert torch.equal(poses, others) and not torch.equal(images, blurred)
    assert (images.float() - blurred.float()).abs().mean() < 16


def test_another_seed_has_other_views(source) -> None:
    poses, images = source(seed=0).draw(1)
    others = source(seed=1).draw(1)
    assert not torch.equal(poses, others[0]) and not torch.equal(images, others[1])


def test_the_bank_gives_back_every_bit_without_rendering(source, renders, tmp_path: Path) -> None:
    plain = [source().draw(k) for k in range(3)]
    filling = source(bank=bank(tmp_path))
    assert all(same(filling.draw(k), plain[k]) for k in range(3))
    assert len(renders) == 6
    reading = source(bank=bank(tmp_path))
    for k in (2, 0, 1):
        found = reading.draw(k)
        assert same(found, plain[k]) and [t.dtype for t in found] == [t.dtype for t in plain[k]]
    assert len(renders) == 6


def test_the_bank_knows_what_its_views_cost(source, tmp_path: Path) -> None:
    filling, reading = source(bank=bank(tmp_path)), source(bank=bank(tmp_path))
    for views in (filling, reading):
        views.draw(0), views.draw(2)
    assert filling.seconds_saved == 0 < reading.seconds_saved
    seconds = bank(tmp_path).seconds
    assert reading.seconds_saved == pytest.approx(float(seconds[0]) + float(seconds[2])) and seconds[1] == 0


def test_a_kept_view_is_the_callers_own(source, tmp_path: Path) -> None:
    views = source(bank=bank(tmp_path))
    poses, images = (t.clone() for t in views.draw(0))
    for tensor in views.draw(0):
        tensor.zero_()
    assert same(views.draw(0), (poses, images))


def test_a_step_that_was_not_marked_is_rendered_again(source, renders, tmp_path: Path) -> None:
    """A writer killed before its last byte leaves pictures behind that nobody vouches for."""
    views = source(bank=bank(tmp_path))
    wanted = [views.draw(k) for k in range(2)]
    killed = bank(tmp_path)
    killed.is_there[1] = False
    killed.images[1] = 77
    again = source(bank=bank(tmp_path))
    assert same(again.draw(0), wanted[0]) and len(renders) == 2
    assert same(again.draw(1), wanted[1]) and len(renders) == 3
    assert same(source(bank=bank(tmp_path)).draw(1), wanted[1]) and len(renders) == 3


def test_the_mark_is_set_after_the_pictures(tmp_path: Path) -> None:
    kept = bank(tmp_path)
    with pytest.raises(ValueError):  # two images of another size: as a write that is cut off
        kept.put(0, torch.zeros(2, 4, 4), torch.zeros(2, 5, 5, 3, dtype=torch.uint8), 0.0)
    assert kept.get(0) is None and bank(tmp_path).get(0) is None


def test_steps_beyond_the_bank_are_rendered_and_not_kept(source, renders, tmp_path: Path) -> None:
    views = source(bank=bank(tmp_path, n_steps=1))
    assert same(views.draw(5), source().draw(5))
    views.draw(5)
    assert len(renders) == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:40]),  # within the header
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-200]),
        lambda path: np.save(path, np.zeros((4, 2, 3, 3, 3), dtype=np.uint8)),
        lambda path: np.save(path, np.zeros((4, 2, *SIZE, 3), dtype=np.float32)),
        lambda path: path.unlink(),
    ],
    ids=["header", "empty", "cut", "shape", "dtype", "missing"],
)
def test_a_damaged_file_of_pictures_is_made_anew(source, tmp_path: Path, damage) -> None:
    views = source(bank=bank(tmp_path))
    wanted = [views.draw(k) for k in range(4)]
    views.bank.images.flush()
    damage(tmp_path / "images.npy")
    again = source(bank=bank(tmp_path))
    assert all(same(again.draw(k), wanted[k]) for k in range(4))


def test_a_bank_of_another_number_of_views_starts_empty(source, tmp_path: Path) -> None:
    source(bank=bank(tmp_path)).draw(0)
    other = source(bank=bank(tmp_path, n_views=3), n_views=3)
    assert same(other.draw(0), source(n_views=3).draw(0))


def test_a_bank_of_more_steps_starts_empty(source, tmp_path: Path) -> None:
    source(bank=bank(tmp_path)).draw(0)
    assert same(source(bank=bank(tmp_path, n_steps=9)).draw(0), source().draw(0))


def test_random_light_is_that_of_any_training_image(source, monkeypatch) -> None:
    codes: list[torch.Tensor] = []

    def watched(*arguments, appearance, **options):
        codes.append(appearance)
        return render_views(*arguments, appearance=appearance, **options)

    monkeypatch.setattr(random_views, "render_views", watched)
    own, any_ = source(n_views=12), source(n_views=12, appearance="random")
    _, origin = own.sampler.draw(12, random_views.step_generator(0, "rvs", 0))
    poses = own.draw(0)[0]
    assert torch.equal(codes[0], CODES[origin])
    assert torch.equal(any_.draw(0)[0], poses)  # the poses stay
    lit = codes[1].argmax(dim=1)
    assert not torch.equal(lit, origin) and set(lit.tolist()) == {0, 1, 2}
    any_.draw(0)
    assert torch.equal(codes[2], codes[1])


def test_a_map_without_codes_is_rendered_without(source) -> None:
    assert same(source(codes=None, appearance="random").draw(0), source(codes=None).draw(0))


def test_a_scale_of_zero_keeps_to_the_way_between_training_poses(source) -> None:
    views = source()
    near, far = (views.draw(0, scale)[0] for scale in (0.0, 1.0))
    expected, _ = views.sampler.draw(len(near), random_views.step_generator(0, "rvs", 0), 0.0)
    assert torch.equal(near, expected) and not torch.equal(near, far)
