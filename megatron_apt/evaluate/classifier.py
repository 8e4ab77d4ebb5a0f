"""Class accuracy: does a sample show what its prompt says, judged by a linear classifier
trained on real data.
"""

from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from torch import Tensor

HELD_OUT = 0.2


@dataclass(frozen=True)
class ClassAccuracy:
    """A classifier and its own accuracy on real data it has not seen, which bounds what
    any generator's score can mean.
    """

    classifier: LogisticRegression
    mean: float
    std: float
    real_accuracy: float

    @classmethod
    def fit(cls, features: Tensor, labels: Tensor, seed: int = 0) -> "ClassAccuracy":
        """Train on 80 % of (N, d) real features with (N,) integer labels and measure
        `real_accuracy` on the other 20 %.

        Raises ValueError if lengths differ, values are not finite, or a class has fewer
        than 2 samples or there is only one.
        """
        x, y = _arrays(features, labels)
        classes, counts = np.unique(y, return_counts=True)
        if len(classes) < 2 or counts.min() < 2:
            raise ValueError(
                f"classes {dict(zip(classes.tolist(), counts.tolist(), strict=True))}: need at least 2 "
                "classes with at least 2 samples each"
            )
        held_out = max(round(HELD_OUT * len(x)), len(classes))
        train_x, test_x, train_y, test_y = train_test_split(
            x, y, test_size=held_out, stratify=y, random_state=seed
        )
        # One mean and scale for all features: scaling each by itself would blow up pixels
        # that hardly vary in real data, and with them the slightest noise of a generator.
        mean, std = float(train_x.mean()), float(train_x.std()) or 1.0
        classifier = LogisticRegression(max_iter=2000, C=0.1).fit((train_x - mean) / std, train_y)
        return cls(classifier, mean, std, float(classifier.score((test_x - mean) / std, test_y)))

    def score(self, features: Tensor, labels: Tensor) -> float:
        """Share of (N, d) samples classified as the (N,) labels their prompts name."""
        x, y = _arrays(features, labels)
        return float(self.classifier.score((x - self.mean) / self.std, y))


def _arrays(features: Tensor, labels: Tensor) -> tuple[np.ndarray, np.ndarray]:
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
        raise ValueError(
            f"features {tuple(features.shape)} with labels {tuple(labels.shape)}; give (N, d) and (N,) with "
            "N >= 1"
        )
    if not features.isfinite().all():
        raise ValueError("features are not all finite; the generator diverged, or the features overflowed")
    return features.detach().double().cpu().numpy(), labels.cpu().numpy()
