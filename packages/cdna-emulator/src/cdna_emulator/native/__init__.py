"""The native core: C++ sources, the library built from them (``_core.so``), and its build."""
