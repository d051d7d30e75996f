"""The operations, a folder each: public function, gradient, custom call, stock collectives."""
