"""Selector and reconstructor joined: gradients, masks and saving."""

import torch

from atr.reduction.autoencoder import FeatureAutoencoder

KWARGS = {"width": 16, "grid": (3, 4), "layers": 1, "heads": 2}


def autoencoder():
    torch.manual_seed(0)
    autoencoder = FeatureAutoencoder(**KWARGS)
    for trunk in (autoencoder.selector.trunk, autoencoder.reconstructor.trunk):
        torch.nn.init.normal_(trunk.head.weight)
    autoencoder.selector.standardise.measure(2 * torch.randn(50, 12, 16) + 3)
    return autoencoder


def test_the_reconstruction_loss_has_gradients_in_all_parameters():
    net = autoencoder()
    features = torch.randn(4, 12, 16)
    restored, _ = net(features, 1.0)
    (restored - features).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_dropped_tokens_do_not_affect_the_reconstruction():
    net = autoencoder()
    features, mask = torch.randn(1, 12, 16), (torch.arange(12) % 3 == 0).float()[None]
    changed = torch.where(mask.bool()[..., None], features, torch.randn(1, 12, 16))
    assert torch.equal(net.restore(features, mask), net.restore(changed, mask))
    assert not torch.equal(net.restore(features, mask), net.restore(changed, 1 - mask))


def test_untrained_reconstructor_restores_the_mean():
    net = FeatureAutoencoder(**KWARGS)
    net.selector.standardise.measure(2 * torch.randn(200, 12, 16) + 3)
    restored, _ = net(torch.randn(2, 12, 16), 1.0)
    torch.testing.assert_close(restored, torch.full_like(restored, 3.0), atol=0.3, rtol=0)


def test_sampling_follows_the_generator():
    net, features = autoencoder(), torch.randn(2, 12, 16)
    masks = [net(features, 1.0, torch.Generator().manual_seed(seed))[1] for seed in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_save_and_load_restore_the_same(tmp_path):
    net = autoencoder().eval()
    net.save_pretrained(tmp_path)
    loaded = FeatureAutoencoder.from_pretrained(tmp_path)
    features, mask = torch.randn(2, 12, 16), torch.ones(2, 12)
    assert torch.equal(net.restore(features, mask), loaded.restore(features, mask))
    assert torch.equal(net.selector(features), loaded.selector(features))
