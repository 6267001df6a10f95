#include "addon/chunk_digests.hpp"

#include "addon/convert.hpp"
#include "addon/task.hpp"
#include "memory/tag_file.hpp"

namespace vmigrate::addon {

Napi::Value digest_later(const Napi::CallbackInfo& info, size_t request_argument,
                         std::function<Result<std::vector<std::byte>>(const memory::ChunkRequest&)> digest) {
  const Napi::Object options = info[request_argument].As<Napi::Object>();
  const auto key = tag_key(text(options, "key"));
  if (!key) return Task::rejected(info.Env(), key.error());
  memory::ChunkRequest request{.key = key.value()};
  request.region_index = static_cast<uint32_t>(number(options, "region"));
  request.first_chunk = static_cast<uint64_t>(number(options, "first"));
  request.chunk_count = static_cast<uint64_t>(number(options, "count"));
  const auto digests = std::make_shared<std::vector<std::byte>>();
  return Task::start(
      info.Env(),
      [digests, request, digest = std::move(digest)]() -> Status {
        auto made = digest(request);
        if (!made) return made.error();
        *digests = std::move(made).value();
        return ok();
      },
      {},
      [digests](Napi::Env env) {
        return Napi::Buffer<uint8_t>::Copy(env, reinterpret_cast<const uint8_t*>(digests->data()),
                                           digests->size());
      });
}

Napi::Value digest_arrived(const Napi::CallbackInfo& info) {
  const Napi::Object region = info[0].As<Napi::Object>();
  const auto page_bytes = static_cast<uint64_t>(number(region, "pageBytes"));
  const uint64_t page_count = u64(region, "lengthBytes") / page_bytes;
  return digest_later(
      info, 1, [path = text(region, "tagPath"), page_count, page_bytes](const memory::ChunkRequest& request) {
        return memory::digest_arrived_chunks(path, page_count, page_bytes, request);
      });
}

}  // namespace vmigrate::addon
