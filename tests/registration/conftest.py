import pytest
import torch


@pytest.fixture
def filled():
    """Fills a network with weights that are not zero anywhere, and returns it."""

    def fill(network):
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        return network

    return fill
