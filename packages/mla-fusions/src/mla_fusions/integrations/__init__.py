"""Other libraries' models on fused layers; each module needs the library it is named after."""
