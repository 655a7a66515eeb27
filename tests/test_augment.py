"""Augmentation against a per-sample reference: every crop and flip exactly, and equally likely."""

import torch
import torch.nn.functional as F
from scipy.stats import chisquare

from utils.data.augment import normalise, random_crop_flip
from utils.data.batches import Batches, Samples
from utils.data.images import Images

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def reference_crops(image, padding):
    """Every possible result for an image (C, H, W), by (top, left, flipped): padded, cropped and flipped one by one."""
    _, height, width = image.shape
    padded = F.pad(image, (padding,) * 4)
    crops = {}
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            crop = padded[:, top:top + height, left:left + width]
            crops[top, left, False], crops[top, left, True] = crop, crop.flip(2)
    return crops


def distinct_pixels(channels, height, width):
    return torch.arange(1, channels * height * width + 1).reshape(channels, height, width)


def test_each_result_is_one_of_the_reference_crops_and_all_are_equally_likely():
    image, padding, draws = distinct_pixels(2, 6, 7).to(torch.uint8), 4, 16_200
    crops = reference_crops(image, padding)
    by_content = {bytes(crop.contiguous().flatten().tolist()): place for place, crop in crops.items()}
    assert len(by_content) == len(crops) == 162, "the crops differ from each other, so a result tells its draw"
    results = random_crop_flip(image.expand(draws, -1, -1, -1), padding=padding)
    counts = dict.fromkeys(crops, 0)
    for result in results:
        counts[by_content[bytes(result.flatten().tolist())]] += 1
    assert chisquare(list(counts.values())).pvalue > 0.01
    for axis in range(3):
        values = sorted({place[axis] for place in crops})
        totals = [sum(count for place, count in counts.items() if place[axis] == value) for value in values]
        assert chisquare(totals).pvalue > 0.01


def test_shapes_dtypes_and_the_input_kept():
    for dtype in (torch.uint8, torch.float32, torch.float64):
        for shape in ((5, 3, 8, 8), (1, 1, 4, 9), (3, 3, 32, 32)):
            images = torch.randint(1, 200, shape).to(dtype)
            before = images.clone()
            result = random_crop_flip(images)
            assert result.shape == images.shape and result.dtype == dtype and torch.equal(images, before)
            for image, its_result in zip(images, result):
                assert any(torch.equal(its_result, crop) for crop in reference_crops(image, 4).values())


def test_padding_of_none_only_flips():
    images = torch.randint(0, 256, (64, 3, 5, 5), dtype=torch.uint8)
    flipped = [torch.equal(result, image.flip(2)) for result, image in zip(random_crop_flip(images, padding=0), images)]
    kept = [torch.equal(result, image) for result, image in zip(random_crop_flip(images, padding=0), images)]
    assert 10 < sum(flipped) < 54 and 10 < sum(kept) < 54


def test_draws_differ_between_samples_and_calls_and_are_restored_with_the_random_state():
    images = distinct_pixels(1, 5, 5).to(torch.uint8).expand(32, -1, -1, -1)
    state = torch.get_rng_state()
    first, second = random_crop_flip(images), random_crop_flip(images)
    assert len(first.flatten(1).unique(dim=0)) > 10 and not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(random_crop_flip(images), first)


def test_a_batch_is_the_same_whenever_it_is_prepared_and_no_two_are_augmented_alike():
    images, labels = distinct_pixels(1, 9, 9).to(torch.uint8).expand(24, -1, -1, -1), torch.arange(24)
    batches = Batches(Samples(images, labels, augment=random_crop_flip), 4, shuffled=True)
    state = torch.get_rng_state()
    whole = list(batches)
    torch.set_rng_state(state)
    for (x, its_labels), (its_x, same_labels) in zip(batches, whole, strict=True):
        assert torch.equal(x, its_x) and torch.equal(its_labels, same_labels)
        torch.rand(3)  # as a pass draws its dropout masks
    for (x, _), (its_x, _) in zip(batches.after(2, state), whole[2:], strict=True):
        assert torch.equal(x, its_x)
    seen = [x for x, _ in [*whole, *batches]]
    assert not any(torch.equal(one, other) for place, one in enumerate(seen) for other in seen[:place])


def test_the_processes_of_a_job_augment_their_shares_each_in_their_own_way(monkeypatch):
    images = distinct_pixels(1, 9, 9).to(torch.uint8).expand(24, -1, -1, -1)
    batches, state = Batches(Samples(images, torch.arange(24), augment=random_crop_flip), 8, shuffled=True), torch.get_rng_state()
    seen = []
    for rank in (0, 1):
        for name, value in (("process_rank", rank), ("process_count", 2)):
            monkeypatch.setattr(f"utils.data.batches.{name}", lambda value=value: value)
        seen += [x for x, _ in batches.after(0, state)]
    assert len(seen) == 6 and all(len(x) == 4 for x in seen)
    assert not any(torch.equal(one, other) for place, one in enumerate(seen) for other in seen[:place])


def test_normalised_per_channel_after_the_padding():
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    expected = (images.double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(normalise(images, MEAN, STD).double(), expected, atol=1e-6, rtol=1e-6)
    labels = torch.arange(6)
    train, test = Images(images, labels, images, labels).augmented(MEAN, STD)
    assert train.inputs is images and test.inputs.dtype == torch.float32
    torch.testing.assert_close(test.inputs.double(), expected, atol=1e-6, rtol=1e-6)
    generator, begun = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    assert torch.equal(train.augment(images, generator), random_crop_flip(images, begun))
    (batch, its_labels), = Batches(train._replace(augment=None), 6, shuffled=False)
    assert torch.equal(batch, normalise(images, MEAN, STD)) and torch.equal(its_labels, labels)
    black = [-mean / std for mean, std in zip(MEAN, STD)]
    batches = [x for _ in range(20) for x, _ in Batches(train._replace(inputs=images | 1), 6, shuffled=True)]
    corners = torch.cat(batches)[:, :, 0, 0]
    beyond = torch.isclose(corners, torch.tensor(black), atol=1e-6).all(1)
    assert 0.3 < beyond.float().mean() < 0.95, "what a crop reaches beyond an image is raw black"
