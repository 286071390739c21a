"""Command-line options that the training scripts share."""

from __future__ import annotations

import argparse

from .alignment import AlignmentOptions


def add_method_options(group: argparse._ArgumentGroup) -> None:
    """Add the options of the methods that both data sets have; see `methods.MethodOptions`."""
    group.add_argument(
        "--class-counts",
        choices=("batch", "global", "none"),
        help="arb (default global; published: both), etf-dr (default batch): what the loss is balanced by",
    )
    group.add_argument("--clamp-logits", type=float, default=0.0, metavar="Z", help="arb: published 30; 0 for none")
    group.add_argument(
        "--unadjusted-cutmix", action="store_true", help="glmc: label by lambda, not by what was pasted, as published"
    )
    group.add_argument("--resample", type=float, metavar="R", help="glmc: loader B draws class c by n_c^(1 - R)")
    group.add_argument("--label-weighting", type=float, metavar="L", help="glmc: class weights go by n_c^-L")
    group.add_argument("--contrast", type=float, metavar="K", help="glmc: weight of the agreement term")
    group.add_argument(
        "--aligned-head", choices=("rebalanced", "conventional"), default="rebalanced", help="glmc: default %(default)s"
    )


def add_alignment_options(parser: argparse.ArgumentParser) -> None:
    """Add the three strategies; see `alignment.AlignmentOptions`."""
    defaults = AlignmentOptions()
    spa = parser.add_argument_group("alignment", "any combination; the hyper-parameters' defaults are ours")
    spa.add_argument("--spareg", type=float, default=0.0, metavar="LAMBDA", help="add SpA-Reg with this weight")
    spa.add_argument("--spareg-align", choices=("both", "classifier", "features"), default=defaults.spareg_align)
    spa.add_argument("--spaslerp", action="store_true", help="rotate the classifier once per epoch (SpA-SLERP)")
    spa.add_argument("--alpha-max", type=float, default=defaults.alpha_max, help="default %(default)s")
    spa.add_argument("--threshold", type=float, default=defaults.threshold, help="cosine, default %(default)s")
    spa.add_argument("--spaproj", action="store_true", help="project the classifier's gradient (SpA-Proj)")
    spa.add_argument("--gamma", type=float, default=defaults.gamma, help="default %(default)s")
    spa.add_argument("--radial", choices=("paper", "keep"), default=defaults.radial, help="default %(default)s")
    spa.add_argument("--momentum", type=float, default=defaults.momentum, help="of class means, default %(default)s")
