#include "memory/page_hasher.hpp"

#include <openssl/evp.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "base/check.hpp"

namespace vmigrate::memory {
namespace {

/// Bytes that one system call reads.
constexpr uint64_t kHashReadBytes = 64 << 10;

struct PageOfZeros {
  uint64_t page_bytes;
  uint64_t digest[2];  ///< of a page of zeros, big-endian
};
constexpr PageOfZeros kPagesOfZeros[] = {
    {4096, {0xad7facb2586fc6e9, 0x66c004d7d1d16b02}},
    {2 << 20, {0x5647f05ec1895894, 0x7d32874eeb788fa3}},
    {1 << 30, {0x49bc20df15e412a6, 0x4472421e13fe86ff}},
};
static_assert(sizeof(PageOfZeros::digest) == wire::kDigestBytes);

/// Fetched once: to look an algorithm up takes longer than to hash a page.
const EVP_MD* sha256() {
  static const EVP_MD* const found = ::EVP_MD_fetch(nullptr, "SHA256", nullptr);
  return found;
}

bool is_zeros(const std::byte* bytes, size_t length_bytes) {
  return bytes[0] == std::byte{0} && std::memcmp(bytes, bytes + 1, length_bytes - 1) == 0;
}

const Error kFileWasCut{ErrorCode::kRegionChanged, 0, "region file changed its length"};
const Error kHashFailed{ErrorCode::kSystem, 0, "SHA-256"};

}  // namespace

std::optional<Digest> digest_of_zeros(uint64_t page_bytes) {
  for (const PageOfZeros& known : kPagesOfZeros) {
    if (known.page_bytes != page_bytes) continue;
    Digest digest;
    for (size_t i = 0; i < digest.size(); ++i)
      digest[i] = static_cast<std::byte>(known.digest[i / 8] >> (56 - i % 8 * 8));
    return digest;
  }
  return std::nullopt;
}

Result<std::unique_ptr<PageHasher>> PageHasher::create() {
  if (sha256() == nullptr) return Error{ErrorCode::kUnsupported, 0, "libcrypto has no SHA-256"};
  EVP_MD_CTX* context = ::EVP_MD_CTX_new();
  if (context == nullptr) return Error{ErrorCode::kOutOfMemory, 0, "SHA-256"};
  return std::unique_ptr<PageHasher>(new PageHasher(context));
}

PageHasher::PageHasher(evp_md_ctx_st* context) : context_(context), buffer_(kHashReadBytes) {}

PageHasher::~PageHasher() {
  ::EVP_MD_CTX_free(context_);
}

void PageHasher::begin(int fd, uint64_t page_bytes, PageRun run) {
  const auto zeros = digest_of_zeros(page_bytes);
  VMG_CHECK(zeros.has_value());
  fd_ = fd;
  page_bytes_ = page_bytes;
  zeros_ = *zeros;
  at_bytes_ = data_bytes_ = raw(run.first) * page_bytes;
  end_bytes_ = at_bytes_ + run.count * page_bytes;
  read_from_bytes_ = read_to_bytes_ = 0;
}

Result<Digest> PageHasher::next() {
  VMG_CHECK(at_bytes_ < end_bytes_);
  const bool is_read = read_from_bytes_ <= at_bytes_ && at_bytes_ < read_to_bytes_;
  if (!is_read && data_bytes_ <= at_bytes_) {
    if (auto found = find_data(); !found) return found.error();
  }
  if (!is_read && data_bytes_ >= at_bytes_ + page_bytes_) {
    at_bytes_ += page_bytes_;
    return zeros_;
  }
  auto digest = page_bytes_ <= kHashReadBytes ? hash_small() : hash_large();
  at_bytes_ += page_bytes_;
  return digest;
}

/// SEEK_HOLE is not asked: it would look at all data of the file that follows.
Status PageHasher::find_data() {
  off_t data;
  do {
    data = ::lseek(fd_, static_cast<off_t>(at_bytes_), SEEK_DATA);
  } while (data < 0 && errno == EINTR);
  if (data >= 0) {
    data_bytes_ = static_cast<uint64_t>(data);
    return ok();
  }
  if (errno != ENXIO) return system_error("lseek SEEK_DATA region");
  // Only a hole from here to the end of the file, or the file ends before.
  struct stat file {};
  if (::fstat(fd_, &file) != 0) return system_error("fstat region");
  if (static_cast<uint64_t>(file.st_size) < end_bytes_) return kFileWasCut;
  data_bytes_ = end_bytes_;
  return ok();
}

Status PageHasher::read_at(uint64_t at_bytes, uint64_t length_bytes) {
  for (uint64_t done = 0; done < length_bytes;) {
    const ssize_t got =
        ::pread(fd_, buffer_.data() + done, length_bytes - done, static_cast<off_t>(at_bytes + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return system_error("pread region");
    if (got == 0) return kFileWasCut;
    done += static_cast<uint64_t>(got);
  }
  read_from_bytes_ = at_bytes;
  read_to_bytes_ = at_bytes + length_bytes;
  return ok();
}

Status PageHasher::update(const std::byte* bytes, size_t length_bytes) {
  return ::EVP_DigestUpdate(context_, bytes, length_bytes) == 1 ? ok() : Status(kHashFailed);
}

Result<Digest> PageHasher::finish() {
  std::array<unsigned char, 32> whole;
  unsigned length_bytes = whole.size();
  if (::EVP_DigestFinal_ex(context_, whole.data(), &length_bytes) != 1) return kHashFailed;
  Digest digest;
  std::memcpy(digest.data(), whole.data(), digest.size());
  return digest;
}

/// Several pages come with one read.
Result<Digest> PageHasher::hash_small() {
  if (at_bytes_ < read_from_bytes_ || at_bytes_ >= read_to_bytes_) {
    if (auto status = read_at(at_bytes_, std::min(kHashReadBytes, end_bytes_ - at_bytes_)); !status)
      return status.error();
  }
  const std::byte* page = buffer_.data() + (at_bytes_ - read_from_bytes_);
  if (is_zeros(page, page_bytes_)) return zeros_;
  if (::EVP_DigestInit_ex(context_, sha256(), nullptr) != 1) return kHashFailed;
  if (auto status = update(page, page_bytes_); !status) return status.error();
  return finish();
}

Result<Digest> PageHasher::hash_large() {
  if (::EVP_DigestInit_ex(context_, sha256(), nullptr) != 1) return kHashFailed;
  for (uint64_t done = 0; done < page_bytes_; done += kHashReadBytes) {
    if (auto status = read_at(at_bytes_ + done, kHashReadBytes); !status) return status.error();
    if (auto status = update(buffer_.data(), kHashReadBytes); !status) return status.error();
  }
  read_from_bytes_ = read_to_bytes_ = 0;
  return finish();
}

}  // namespace vmigrate::memory
