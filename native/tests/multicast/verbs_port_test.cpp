// Tests a multicast over RDMA, from one device of this host to the others.

#if __has_include(<infiniband/verbs.h>) && __has_include(<rdma/rdma_cma.h>)

#include <gtest/gtest.h>

#include "tests/multicast/harness.hpp"
#include "tests/transport/fixture.hpp"
#include "transport/verbs/host/cm.hpp"
#include "transport/verbs/provider.hpp"

namespace vmigrate::multicast {
namespace {

using test::CheckingSink;
using test::eventually;
using test::open_receiver;
using test::open_sender;
using test::random_group;
using test::reaches;
using test::SentFiles;

class VerbsMulticast : public testing::Test {
 protected:
  void SetUp() override {
    if (const std::string missing = transport::missing_for(transport::kVerbsProvider); !missing.empty())
      GTEST_SKIP() << missing;
    places_ = transport::verbs_places().value();
    group_.provider = "verbs";
  }
  /// The group as the host with this device has it.
  Group at(size_t place) const {
    Group group = group_;
    group.interface_address = places_[place % places_.size()].address;
    return group;
  }
  Group group_ = random_group();
  std::vector<transport::VerbsPlace> places_;
};

TEST_F(VerbsMulticast, BringsPagesToReceiversAndReportsBack) {
  SentFiles files(SentFiles::Specs{{600, [](uint64_t page) { return page % 4 != 3; }}});
  CheckingSink first(files), second(files);
  const auto one = open_receiver(at(1), 1, first), two = open_receiver(at(1), 2, second);
  const auto sender = open_sender(at(0), files, 1'000'000);
  ASSERT_TRUE(sender->start().ok());
  ASSERT_TRUE(reaches(*sender, SenderState::kEnded));
  ASSERT_TRUE(reaches(*one, ReceiverState::kEnded) && reaches(*two, ReceiverState::kEnded));
  for (const CheckingSink* sink : {&first, &second}) {
    EXPECT_EQ(sink->bad_pages, 0u);
    EXPECT_GT(sink->count(), files.data_pages / 2);
  }
  EXPECT_EQ(sender->counters().sent_pages, files.data_pages) << "it has heard its receivers";
  EXPECT_EQ(sender->members().size(), 2u);
  EXPECT_EQ(one->counters().rejected_datagrams, 0u);
}

TEST_F(VerbsMulticast, CanBeClosedAndJoinedAgain) {
  for (int i = 0; i < 5; ++i) {
    SentFiles files(SentFiles::Specs{{100}});
    CheckingSink sink(files);
    Group group = at(1), sending = at(0);
    const auto receiver = open_receiver(group, static_cast<uint16_t>(1 + i), sink);
    const auto sender = open_sender(sending, files, 1'000'000);
    ASSERT_TRUE(sender->start().ok());
    ASSERT_TRUE(eventually([&] { return sink.count() > 10; }));
    if (i % 2 == 0) receiver->close();
    sender->close();
    EXPECT_EQ(sink.bad_pages, 0u);
  }
}

TEST_F(VerbsMulticast, AnAddressWithoutADeviceIsRefused) {
  Group group = at(0);
  group.interface_address = "127.0.0.1";
  const auto port = open_port(group, Role::kReceiver);
  ASSERT_FALSE(port.ok());
  group = at(0);
  group.address = places_[0].address;
  EXPECT_EQ(open_port(group, Role::kReceiver).error().code, ErrorCode::kInvalidArgument);
}

}  // namespace
}  // namespace vmigrate::multicast

#endif
