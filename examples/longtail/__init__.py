"""What the long-tail example scripts share: data, augmentation, networks, baselines, engine, reporting."""
