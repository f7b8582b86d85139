"""Private interfaces of other libraries, one function and one test each."""
