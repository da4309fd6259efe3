"""Tools for modules: convert, explain, trace, stream, and use in models of other packages."""
