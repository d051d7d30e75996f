# Writes the source file OUTPUT, which says what was built: the version in INIT, and a hash of
# SOURCES, in the folder FOLDER. Processes of a group compare it.
file(STRINGS "${INIT}" version REGEX "^__version__ = ")
string(REGEX REPLACE "^__version__ = \"(.*)\"$" "\\1" version "${version}")
set(all "")
foreach(source IN LISTS SOURCES)
  file(SHA256 "${FOLDER}/${source}" hash)
  string(APPEND all "${source} ${hash}\n")
endforeach()
string(SHA256 hash "${all}")
string(SUBSTRING "${hash}" 0 12 hash)
file(WRITE "${OUTPUT}" "namespace jax_ep {
extern const char kBuild[];
const char kBuild[] = \"${version}+${hash}\";
}  // namespace jax_ep
")
