"""Term rules for the layers of other libraries; each file is imported only if its library is."""
