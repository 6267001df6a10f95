// Stands in for QEMU in tests: maps region files, touches their bytes and says what it sees. One command a
// line on stdin, one answer a line on stdout; ends with stdin. With LD_PRELOAD it is what the preload lives
// in; without, it prepares files.
//
//   map PATH LENGTH OFFSET shared|private|fixed   -> mapped INDEX | failed ERRNO (fixed: over a reservation,
//   which is checked after a failure) fork-map PATH LENGTH                          -> the same, from a
//   forked child map-all LENGTH PATH...                        -> mapped-all COUNT, each path from a thread
//   of its own fill PATH LENGTH SEED                         -> filled, the file holds the pattern (every
//   fourth page is a hole) verify INDEX OFFSET LENGTH SEED               -> verified PAGES BAD touch INDEX
//   OFFSET                            -> byte VALUE poke INDEX OFFSET VALUE -> poked environment ->
//   environment NAME=VALUE... of our variables, as a child process sees them open -> opened NUMBER, the next
//   free descriptor descriptors                                   -> descriptors COUNT, of userfaultfds in a
//   child process trim -> trimmed 1|0: malloc_trim of a heap with free pages has given some back | has not

#include <fcntl.h>
#include <malloc.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

// The heap that malloc_trim trims. A sanitizer has malloc itself in another.
extern "C" {
void* __libc_malloc(size_t length_bytes);
void __libc_free(void* memory);
}

namespace {

constexpr uint64_t kPageBytes = 4096;

struct Mapping {
  volatile uint64_t* base;
  uint64_t length_bytes;
};
std::vector<Mapping> mappings;

/// The expected value of a word of a filled file; zero only in a hole.
uint64_t pattern(uint64_t offset_bytes, uint64_t seed) {
  if (offset_bytes / kPageBytes % 4 == 3) return 0;
  uint64_t value = offset_bytes + seed * 0x9e3779b97f4a7c15u;
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
  value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
  return (value ^ (value >> 31)) | 1;
}

void* map_file(const std::string& path, uint64_t length, uint64_t offset, const std::string& how) {
  const int fd = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (fd < 0) return MAP_FAILED;
  void* address = nullptr;
  int flags = how == "private" ? MAP_PRIVATE : MAP_SHARED;
  if (how == "fixed") {
    address = mmap(nullptr, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    flags |= MAP_FIXED;
  }
  errno = 77;
  void* mapping = mmap(address, length, PROT_READ | PROT_WRITE, flags, fd, static_cast<off_t>(offset));
  const int map_errno = errno;
  if (mapping == MAP_FAILED && how == "fixed") {
    // The reservation must still be ours: nothing else can be placed there.
    void* again = mmap(address, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    if (again != MAP_FAILED || errno != EEXIST) std::cerr << "the reservation is gone\n";
  }
  close(fd);
  errno = map_errno;
  return mapping;
}

std::string map_command(const std::string& path, uint64_t length, uint64_t offset, const std::string& how) {
  void* mapping = map_file(path, length, offset, how);
  if (mapping == MAP_FAILED) return "failed " + std::to_string(errno);
  if (errno != 77) return "errno changed";
  mappings.push_back({static_cast<volatile uint64_t*>(mapping), length});
  return "mapped " + std::to_string(mappings.size() - 1);
}

std::string fork_map(const std::string& path, uint64_t length) {
  const pid_t child = fork();
  if (child == 0) _exit(map_file(path, length, 0, "shared") == MAP_FAILED ? errno : 0);
  int status = 0;
  waitpid(child, &status, 0);
  return WEXITSTATUS(status) == 0 ? "mapped" : "failed " + std::to_string(WEXITSTATUS(status));
}

std::string map_all(uint64_t length, std::istream& paths) {
  std::vector<std::string> names;
  for (std::string path; paths >> path;) names.push_back(path);
  std::vector<void*> results(names.size(), MAP_FAILED);
  std::vector<std::thread> threads;
  for (size_t i = 0; i < names.size(); i++)
    threads.emplace_back([&, i] { results[i] = map_file(names[i], length, 0, "shared"); });
  for (std::thread& thread : threads) thread.join();
  size_t count = 0;
  for (void* result : results) count += result != MAP_FAILED;
  return "mapped-all " + std::to_string(count);
}

std::string fill(const std::string& path, uint64_t length, uint64_t seed) {
  const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (fd < 0 || ftruncate(fd, static_cast<off_t>(length)) != 0) return "failed " + std::to_string(errno);
  uint64_t words[kPageBytes / sizeof(uint64_t)];
  for (uint64_t page = 0; page < length; page += kPageBytes) {
    if (page / kPageBytes % 4 == 3) continue;
    for (uint64_t at = 0; at < kPageBytes; at += sizeof(uint64_t))
      words[at / sizeof(uint64_t)] = pattern(page + at, seed);
    if (pwrite(fd, words, sizeof words, static_cast<off_t>(page)) != static_cast<ssize_t>(sizeof words))
      return "failed " + std::to_string(errno);
  }
  close(fd);
  return "filled";
}

std::string verify(size_t index, uint64_t offset, uint64_t length, uint64_t seed) {
  uint64_t bad = 0;
  for (uint64_t page = offset; page < offset + length; page += kPageBytes) {
    bool is_bad = false;
    for (uint64_t at = page; at < page + kPageBytes; at += sizeof(uint64_t))
      is_bad |= mappings.at(index).base[at / sizeof(uint64_t)] != pattern(at, seed);
    bad += is_bad;
  }
  return "verified " + std::to_string(length / kPageBytes) + " " + std::to_string(bad);
}

/// Returns the first line that a shell command prints.
std::string child_output(const char* command) {
  FILE* pipe = popen(command, "r");
  char line[1024] = "";
  if (pipe == nullptr || fgets(line, sizeof line, pipe) == nullptr) line[0] = '\0';
  if (pipe != nullptr) pclose(pipe);
  line[strcspn(line, "\n")] = '\0';
  return line;
}

/// Free pages below a block that is in use: only malloc_trim gives them back.
std::string trim() {
  constexpr size_t kBlockBytes = 16 * 1024;
  std::vector<void*> blocks(256);
  for (void*& block : blocks) block = __libc_malloc(kBlockBytes);
  for (void* block : blocks) std::memset(block, 1, kBlockBytes);
  void* const above = __libc_malloc(kBlockBytes);
  for (void* block : blocks) __libc_free(block);
  errno = 77;
  const int outcome = malloc_trim(0);
  if (errno != 77) return "errno changed";
  __libc_free(above);
  return "trimmed " + std::to_string(outcome);
}

std::string answer(const std::string& line) {
  std::istringstream words(line);
  std::string command, path, how;
  uint64_t length = 0, offset = 0, seed = 0;
  size_t index = 0;
  words >> command;
  if (command == "map" && words >> path >> length >> offset >> how)
    return map_command(path, length, offset, how);
  if (command == "fork-map" && words >> path >> length) return fork_map(path, length);
  if (command == "map-all" && words >> length) return map_all(length, words);
  if (command == "fill" && words >> path >> length >> seed) return fill(path, length, seed);
  if (command == "verify" && words >> index >> offset >> length >> seed)
    return verify(index, offset, length, seed);
  if (command == "touch" && words >> index >> offset)
    return "byte " +
           std::to_string(reinterpret_cast<volatile unsigned char*>(mappings.at(index).base)[offset]);
  if (unsigned value = 0; command == "poke" && words >> index >> offset >> value) {
    reinterpret_cast<volatile unsigned char*>(mappings.at(index).base)[offset] =
        static_cast<unsigned char>(value);
    return "poked";
  }
  if (command == "trim") return trim();
  if (command == "environment")
    return "environment " +
           child_output("env | grep -E '^(VMIGRATE_PRELOAD_|LD_PRELOAD=)' | sort | tr '\\n' ' '");
  if (command == "descriptors")
    return "descriptors " + child_output("ls -l /proc/self/fd | grep -c userfaultfd");
  if (command == "open") return "opened " + std::to_string(open("/dev/null", O_RDONLY));
  return "unknown command";
}

}  // namespace

int main() {
  for (std::string line; std::getline(std::cin, line);) std::cout << answer(line) << std::endl;
}
