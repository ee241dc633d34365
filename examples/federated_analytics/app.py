"""A secure histogram and mean: every node holds a few measurements, the server learns only sums over the nodes."""

import numpy as np
from sklearn.datasets import load_wine

from privfed import ClientApp, Context, Grid, Message, RecordDict, ServerApp
from privfed.mods import secure_aggregation
from privfed.record import ArrayRecord
