"""spalign: align classifier rows and class feature means in existing PyTorch training loops.

Three strategies of the paper *Space Alignment Matters*, all reading one running class-mean tracker:

- :class:`SpARegLoss`, a loss term;
- :class:`SpASlerp`, a scheduler-like rotation of classifier rows;
- :class:`SpAProj`, an optimizer wrapper that removes harmful gradient.

``spalign.functional`` has the same as pure tensor functions, ``spalign.metrics`` measures neural collapse, NC1 to NC4,
and ``spalign.theory`` is the geometry and the error exponents that the paper argues with.
"""

from spalign import functional, metrics, theory
from spalign.capture import FeatureCapture
from spalign.classifier import Classifier
from spalign.proj import SpAProj
from spalign.reg import SpARegLoss
from spalign.slerp import SpASlerp
from spalign.tracker import ClassMeanTracker

__version__ = "0.1.0"

__all__ = [
    "ClassMeanTracker",
    "Classifier",
    "FeatureCapture",
    "SpAProj",
    "SpARegLoss",
    "SpASlerp",
    "functional",
    "metrics",
    "theory",
]
