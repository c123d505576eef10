// Repeats the calls recorded on a tape (tests/runtime/tape.py) with a library
// for another CPU, and compares the memory that they leave bit for bit.
// usage: replay LIBRARY TAPE
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

typedef void Call(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                  int64_t);
static FILE *tape;

static int64_t next() {
  int64_t number = 0;
  return fread(&number, sizeof number, 1, tape) == 1 ? number : 0;
}
static std::string next_bytes() {
  std::string bytes(next(), '\0');
  bytes.resize(fread(&bytes[0], 1, bytes.size(), tape));
  return bytes;
}

int main(int, char **argv) {
  void *library = dlopen(argv[1], RTLD_NOW);
  tape = std::fopen(argv[2], "rb");
  int64_t wrong = 0;
  for (int64_t calls = next(); calls > 0; calls--) {
    const std::string name = next_bytes(), before = next_bytes();
    std::string after = next_bytes();
    char *memory = (char *)std::aligned_alloc(64, before.size());
    std::memcpy(memory, before.data(), before.size());
    // Recorded pointers are offsets from the start of the memory.
    for (int64_t pointers = next(); pointers > 0; pointers--) {
      const int64_t at = next();
      char *target = memory + *(const int64_t *)(memory + at);
      std::memcpy(memory + at, &target, sizeof target);
      std::memcpy(&after[at], &target, sizeof target);
    }
    // Integers and pointers alike are passed in one register each.
    int64_t a[8] = {}, count = next();
    for (int64_t i = 0; i < count; i++) {
      const bool is_pointer = next() != 0;
      a[i] = next() + (is_pointer ? (int64_t)memory : 0);
    }
    Call *call = (Call *)dlsym(library, name.c_str());
    call(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]);
    int64_t differ = 0;
    for (size_t i = 0; i < after.size(); i++) differ += memory[i] != after[i];
    std::printf("%s: %lld bytes differ\n", name.c_str(), (long long)differ);
    wrong += differ;
    std::free(memory);
  }
  return wrong != 0;
}
