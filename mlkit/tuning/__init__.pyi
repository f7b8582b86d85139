from .oracle import Search as Search
from .search import train_best as train_best
from .search import tune as tune
from .search_space import read_space as read_space
