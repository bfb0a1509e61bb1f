"""
Numbers to check an edited loss by, without training:

    python -i exercises/check.py       # in the folder of distill.py; then L(0), L(1)
"""
import sys

import torch

sys.path.insert(0, ".")
from distill import *

torch.manual_seed(0)
h, w, t, y = torch.randn(2, 5, 8), torch.randn(11, 8), torch.randn(2, 5, 11), torch.randint(11, (2, 5))


def L(alpha, teacher_logits=t, **more):
    """The plain loss of ten tokens of a vocabulary of 11, rounded."""
    return round(distill_loss_reference(h, w, y, alpha, teacher_logits, **more)[0].item(), 3)
