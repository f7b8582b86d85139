"""Uses of private APIs of other libraries, one module for each library and one function for each use."""
