#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "base/result.hpp"
#include "fetch/endpoints.hpp"
#include "fetch/near/holders.hpp"
#include "image/digests/digests.hpp"
#include "image/holder/multicast_feed.hpp"
#include "image/serve/state.hpp"
#include "memory/region_config.hpp"
#include "source/region_reader.hpp"
#include "vm/memory.hpp"

namespace vmigrate::pager {

struct ImageFetchConfig {
  std::vector<TargetRegionConfig> image;
  FetchOptions options;
  bool resume = false;            ///< take over the presence maps
  std::function<void()> on_edge;  ///< as for TargetSession::open
  /// What the pages must be, as far as that is known; it may become known while the image fills. Of the
  /// regions of `image`; nullptr: the holder is believed.
  std::shared_ptr<ImageDigests> digests{};
};

/// Fills an image of this host from another holder of it, and serves the clones that run on it meanwhile
/// (docs/PAGE_STATES.md, "Images"). It owns its threads: one that serves the clones and reads the pages they
/// wait for, one for bulk, and one for bulk from near holders. The threads end when the image is complete.
/// Thread-safe for its callers.
class ImageFetch {
 public:
  static Result<std::unique_ptr<ImageFetch>> open(ImageFetchConfig config);
  /// Calls leave() unless close or leave was called before.
  virtual ~ImageFetch() = default;

  /// Gives the session its connections. Allowed from kIdle or kDisconnected. Operations that were outstanding
  /// when the old connections broke are posted again.
  virtual Status connect(SourceEndpoints endpoints) = 0;
  /// From kIdle, once connected: clones are served. Only pages that they ask for are read, and which pages
  /// are holes.
  virtual Status start() = 0;
  /// After start: reads the remaining pages as well. Idempotent. `order`: clusters that clones have touched
  /// before (memory/touch_order.hpp), which are read first; it counts once. Only an order: whatever it says,
  /// each page is read.
  virtual Status sweep(std::vector<uint32_t> order = {}) = 0;
  /// Another host that holds a part of the image, or all of it (reader): its pages are read there before the
  /// holder of connect() is asked, those of the nearest level first (0). `id` is the caller's name for it. In
  /// every state before close, also while another add_near runs. As for NearHolders::add.
  virtual Status add_near(SourceEndpoints endpoints, uint32_t id, uint32_t level) = 0;
  /// Ends its connections; what they were to bring is read elsewhere. No effect if there is none.
  virtual void remove_near(uint32_t id) = 0;
  /// Also those that are lost, until they are removed or replaced.
  virtual std::vector<NearSnapshot> nears() const = 0;
  /// One region of the image for hosts to which this one is near: a source session serves it from now on,
  /// while the image fills and after. The fetch must outlive it. nullptr: there is no such region.
  virtual std::unique_ptr<RegionReader> reader(uint32_t region_index) = 0;
  /// Takes pages that the root sends to a group as well, until that ends. Before close, and once only
  /// (kAlreadyExists). Errors change nothing: the pages come from the holder then. May block for seconds,
  /// until the fabric has let this host into the group. `port`: for tests.
  virtual Status join_multicast(const multicast::Group& group, uint16_t member,
                                std::unique_ptr<multicast::DatagramPort> port = nullptr) = 0;
  virtual MulticastSnapshot multicast() const = 0;
  /// As for ImageCapture.
  virtual Status add_clone(const VmMemory& memory) = 0;
  virtual void remove_clone(const VmMemory& memory) = 0;
  /// Looks whether pages that are here are what their digests say, and returns the first that is not. The
  /// digests of all pages of the run must be known. Pages whose digests were known before they came have been
  /// looked at then; so every page has been, once this has been called for each run of digests that became
  /// known after start. In every state; kClosed once close has been called. It may take long.
  virtual Result<std::optional<PageIndex>> check(uint32_t region_index, PageRun run) const = 0;
  /// Ends the threads. Pages that are not here stay missing, and the clones that wait for them keep waiting.
  /// Idempotent.
  virtual void close() = 0;

  virtual std::vector<uint32_t> touched() const = 0;
  virtual ImageState state() const = 0;
  virtual std::optional<Error> failure() const = 0;
  /// Those of the parent stay 0.
  virtual void counters(std::span<uint64_t, wire::kImageCounterCount> out) const = 0;
};

}  // namespace vmigrate::pager
