"""Robust aggregation rules: pure functions on rows of numbers, one row a client.

X is a 2-D array (n, d), a memory map, a list of rows, or a list of lists of layers; results have the form and
dtype of one row. f is the number of Byzantine clients to tolerate. Rows belong in the order of node ids: ties go
to the lowest index. Rows that hold NaN, infinity or huge numbers are left out and counted against f; `screen`
does it apart and says which. Everything else that cannot be promised raises Refusal.
"""

from privfed.strategies.compiled import fast
from privfed.strategies.coordinate import meamed, mean_around, median, phocas, trimmed_mean
from privfed.strategies.gram import Gram, gram
from privfed.strategies.guard import Exclusion, Refusal, Screened, screen
from privfed.strategies.law import LAWS, Law
from privfed.strategies.matrix import Matrix, as_matrix, threads
from privfed.strategies.middle import (
    centered_clipping,
    clip_weights,
    geometric_median,
    geometric_median_weights,
    mean,
    norm_bounding,
    weighted_mean,
)
from privfed.strategies.mixing import (
    arc,
    arc_radius,
    bucket_weights,
    bucketing,
    clipping,
    lazy_arc,
    lazy_bucketing,
    lazy_clipping,
    lazy_mixing,
    nearest_neighbor_mixing,
    neighbor_weights,
)
from privfed.strategies.selection import (
    bulyan,
    bulyan_rows,
    cge,
    cge_weights,
    krum,
    krum_scores,
    krum_weights,
    minimum_diameter_mean,
    minimum_diameter_weights,
    monna,
    monna_weights,
    multi_krum,
    multi_krum_weights,
)
from privfed.strategies.spectral import caf, caf_weights, dnc, dnc_rows, smea, smea_weights
from privfed.strategies.trust import (
    flame,
    flame_weights,
    fltrust,
    fltrust_weights,
    foolsgold,
    foolsgold_weights,
)

__all__ = [
    "LAWS",
    "Exclusion",
    "Gram",
    "Law",
    "Matrix",
    "Refusal",
    "Screened",
    "arc",
    "arc_radius",
    "as_matrix",
    "bucket_weights",
    "bucketing",
    "bulyan",
    "bulyan_rows",
    "caf",
    "caf_weights",
    "centered_clipping",
    "cge",
    "cge_weights",
    "clip_weights",
    "clipping",
    "dnc",
    "dnc_rows",
    "fast",
    "flame",
    "flame_weights",
    "fltrust",
    "fltrust_weights",
    "foolsgold",
    "foolsgold_weights",
    "geometric_median",
    "geometric_median_weights",
    "gram",
    "krum",
    "krum_scores",
    "krum_weights",
    "lazy_arc",
    "lazy_bucketing",
    "lazy_clipping",
    "lazy_mixing",
    "meamed",
    "mean",
    "mean_around",
    "median",
    "minimum_diameter_mean",
    "minimum_diameter_weights",
    "monna",
    "monna_weights",
    "multi_krum",
    "multi_krum_weights",
    "nearest_neighbor_mixing",
    "neighbor_weights",
    "norm_bounding",
    "phocas",
    "screen",
    "smea",
    "smea_weights",
    "threads",
    "trimmed_mean",
    "weighted_mean",
]
