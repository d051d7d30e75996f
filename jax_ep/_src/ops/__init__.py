"""The operations, one folder each: public function, gradient, custom call, stock version."""
